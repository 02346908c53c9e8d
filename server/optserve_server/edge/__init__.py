"""Where calls come in: the only place for gRPC and protobuf."""
