"""Runs that are mirrored in a bucket: the S3 server of the mirror's own tests."""

from tests.mirror.conftest import s3, s3_server

__all__ = ["s3", "s3_server"]
