"""The experiments of the ADADELTA paper, arXiv:1212.5701, section 4, run through the service."""
