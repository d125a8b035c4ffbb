"""Copies of a run off its machine: one writer, checkpoints that appear whole, a way back. No torch.

Where to begin, in the order in which one rests on the other:

head.json   head: the one document that says what exists; heads: read and swapped; identity: is it the same
            run? leftovers: what no head names
who writes  preflight: is the store good enough? claim: who may take the run, as a pure decision; lease:
            taken, kept, lost; keeper: its thread; lease_words; found: what was there
sending     worker: the process of the mirror; job, talk: what it and the trainer say; looks: again and again;
            publisher: one look; local, records, small_files, outbox, corpora: what is sent; sending: how;
            outage: a store that fails; push_command
coming back restore: a folder becomes the run; choosing: whose rows, which checkpoint; fetch: a checkpoint,
            by download; restored_records (by merging), restored_corpora; patience: a store that is away;
            pull_command
gone        trash: that of a mirror; old_corpora: those that no run names

Stores are `stores/`, `x1 runs` is `runs/`. What is guaranteed is in docs/mirror.md.
"""
