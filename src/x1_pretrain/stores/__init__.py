"""Where bytes lie off the machine: s3://, gs://, az://, hf:// and folders, behind one face. Knows no runs.

store: what is asked of one, and how it fails; address -> opened: from `s3://bucket/runs` to a store;
folder_store; object_store (aws, object_errors: S3, gs://, az://); hub_store (hub_repository, hub_staging,
hub_client); for all of them: pieces, clock.
"""
