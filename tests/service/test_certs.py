"""`optserve certs`: an authority of one's own, which signs certificates for a server and its clients."""

import stat
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from optserve.cli import authority
from service.certificate_files import DAY, command, issue, signed


def test_certs_makes_an_authority_and_signs_again(tmp_path):
    made = tmp_path / "made"
    first = command("certs", str(made), "--host", "trainer.example", "--host", "10.0.0.7", "--client", "anna")
    assert first.returncode == 0, first.stderr
    assert sorted(path.name for path in made.iterdir()) == sorted(
        f"{name}{ending}" for name in ("authority", "server", "anna") for ending in (".pem", "-key.pem")
    )
    for path in made.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if path.name.endswith("-key.pem") else 0o644)
    assert f"OPTSERVE_CLIENT_TLS_KEY={made}/anna-key.pem" in first.stdout
    certificate = x509.load_pem_x509_certificate((made / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["trainer.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    assert certificate.not_valid_after_utc - datetime.now(UTC) > 364 * DAY
    kept = (made / "authority.pem").read_bytes()
    assert command("certs", str(made), "--days", "2").returncode == 0
    assert (made / "authority.pem").read_bytes() == kept
    renewed = x509.load_pem_x509_certificate((made / "server.pem").read_bytes())
    assert renewed.serial_number != certificate.serial_number
    assert renewed.not_valid_after_utc - datetime.now(UTC) < 2 * DAY


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "https://trainer.example"], "neither a host's name nor an address"),
        (["--host", "trainer.example:50051"], "neither a host's name nor an address"),
        (["--host", "*.*.example"], "neither a host's name nor an address"),
        (["--client", "../anna"], "cannot be the name of a client"),
        (["--client", "server"], "cannot be the name of a client"),
        (["--client", "a-key"], "cannot be the name of a client"),
    ],
)
def test_certs_refuses_what_it_cannot_sign(tmp_path, arguments, message):
    done = command("certs", str(tmp_path / "made"), *arguments)
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("what", ["damaged", "without its key"])
def test_certs_does_not_replace_an_authority_that_cannot_sign(tmp_path, what):
    issue(tmp_path)
    kept = (tmp_path / "server.pem").read_bytes()
    if what == "damaged":
        (tmp_path / "authority.pem").write_text("nothing")
    else:
        (tmp_path / "authority-key.pem").unlink()
    done = command("certs", str(tmp_path))
    assert done.returncode == 1
    assert "authority" in done.stderr
    assert (tmp_path / "server.pem").read_bytes() == kept


def test_certs_replaces_a_key_and_its_certificate_or_neither(tmp_path):
    """Here with a limit of 512 bytes for a file: a key is shorter, a certificate longer."""
    issue(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before["server-key.pem"]) < 512 < len(before["server.pem"])
    code = (
        "import resource, sys; from optserve.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512)); sys.argv[1:] = ['certs', sys.argv[1]]; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_certs_works_in_a_folder_alone(tmp_path):
    with authority.working_in(tmp_path):
        done = command("certs", str(tmp_path))
    assert done.returncode == 1
    assert "Another `optserve certs` works in" in done.stderr
    assert not list(tmp_path.iterdir())


def test_certs_takes_no_authority_from_a_folder_into_which_everybody_may_write(tmp_path):
    tmp_path.chmod(0o1777)
    done = command("certs", str(tmp_path))
    assert done.returncode == 1
    assert "Everybody may write into" in done.stderr
    assert not list(tmp_path.iterdir())


def test_certs_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "theirs").write_text("kept")
    (tmp_path / "made/server-key.pem").symlink_to(tmp_path / "theirs")
    assert command("certs", str(tmp_path / "made")).returncode == 0
    assert (tmp_path / "theirs").read_text() == "kept"
    assert stat.S_IMODE((tmp_path / "made/server-key.pem").lstat().st_mode) == 0o600


def test_certs_says_that_the_authority_ends_before_the_days_are_over(tmp_path):
    made = tmp_path / "made"
    authority.load_or_make(made, DAY)
    # An address with its brackets is the address.
    done = command("certs", str(made), "--host", "[::1]", "--days", "3650")
    assert done.returncode == 0, done.stderr
    assert "The authority ends" not in done.stdout
    assert "--target [::1]:50051" in done.stdout
    certificate = x509.load_pem_x509_certificate((made / "authority.pem").read_bytes())
    key = serialization.load_pem_private_key((made / "authority-key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    short = signed(key, subject=certificate.subject, authority=True)
    (made / "authority.pem").write_bytes(short)
    done = command("certs", str(made), "--days", "30")
    assert done.returncode == 0, done.stderr
    assert "The authority ends before the 30 days are over" in done.stdout
