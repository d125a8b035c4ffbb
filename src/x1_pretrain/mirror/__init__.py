"""Copies of a run off its machine: one writer, checkpoints that appear whole, a way back. No torch.

Where to begin, in the order in which one rests on the other:

stores      store: what is asked of one; address -> opened: from `s3://bucket/runs` to a store; folder_store;
            object_store (aws, object_errors: S3, gs://, az://); hub_store (hub_repository, hub_staging,
            hub_client); for all of them: pieces, clock; preflight: is this one good enough?
head.json   head: the one document that says what exists; heads: read and swapped; identity: is it the same
            run? leftovers: what no head names
who writes  claim: who may take the run, as a pure decision; lease: taken, kept, lost; keeper: its thread;
            lease_words; found: what was there
sending     worker: the process of the mirror; job, talk: what it and the trainer say; looks: again and again;
            publisher: one look; local, records, small_files, outbox, corpora: what is sent; sending: how;
            outage: a store that fails; state: mirror.json in the run folder; push_command
coming back restore: a folder becomes the run; choosing: whose rows, which checkpoint; fetch: a checkpoint,
            by download; restored_records (by merging), restored_corpora; patience: a store that is away;
            pull_command
`x1 runs`   runs_command; listing: the table; removal, emptying: into the trash and out of it; trash: that of
            a mirror

What is guaranteed is in docs/mirror.md.
"""
