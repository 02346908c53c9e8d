# The server and its command line, as a small image that runs as nobody in particular: also as a user that a cluster
# chooses, with group 0.
#   docker build -t optserve .                        the CPU server (numba)
#   docker build -t optserve:cuda --target cuda .     the GPU server (cupy, CUDA 12); needs the NVIDIA container toolkit
# For a build without a package index, `make wheels` fills dist/wheels, and
#   --build-arg PIP_OPTIONS="--no-index --find-links /src/dist/wheels" uses it.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build-cpu
ARG PIP_OPTIONS=""
RUN python3 -m venv /opt/optserve
COPY . /src
# The very releases that the tests ran with.
RUN grep -v '^-e' /src/requirements/run.txt >/constraints.txt \
    && /opt/optserve/bin/pip install --no-cache-dir --no-compile ${PIP_OPTIONS} -c /constraints.txt "/src[server,numba]"
# Compiled once here, as a container cannot keep what it compiles; not what only the packages' own tests import.
RUN /opt/optserve/bin/python -m compileall -q -x '/tests?/' --invalidation-mode unchecked-hash /opt/optserve/lib

FROM build-cpu AS build-cuda
ARG PIP_OPTIONS=""
RUN /opt/optserve/bin/pip install --no-cache-dir --no-compile ${PIP_OPTIONS} -c /constraints.txt "/src[server,cuda12]" \
    && /opt/optserve/bin/python -m compileall -q -x '/tests?/' --invalidation-mode unchecked-hash /opt/optserve/lib

FROM ${BASE} AS runtime
# The published image comes without the compiled files of Python's own library.
RUN python3 -m compileall -q -x '/(tests?|idlelib|lib2to3|site-packages|dist-packages)/' \
    "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
# Volumes take the owner and the mode of the folders that they are mounted over. Clusters run images as a user of their
# own choice in group 0.
RUN mkdir /data /cache && chown 10001:0 /data /cache && chmod g+rwX /data /cache
ENV PATH=/opt/optserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONFAULTHANDLER=1 \
    XDG_CACHE_HOME=/cache \
    OPTSERVE_TARGET_FILE=/tmp/optserve.target
VOLUME /data
USER 10001:10001
WORKDIR /data
EXPOSE 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s --retries=3 CMD ["optserve", "health"]
ENTRYPOINT ["optserve"]
CMD ["serve", "--host", "0.0.0.0", "--data-dir", "/data"]

FROM runtime AS cuda
COPY --from=build-cuda /opt/optserve /opt/optserve
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CUPY_CACHE_DIR=/tmp/cupy

FROM runtime AS cpu
COPY --from=build-cpu /opt/optserve /opt/optserve
