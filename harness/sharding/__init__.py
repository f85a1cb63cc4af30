"""The files of a checkpoint whose state is sharded over the ranks, and how they are saved.

A tensor that is sharded stands in the checkpoint's main file without data, and each rank writes the
parts that it holds into a file of its own, a shard. Names, shapes and dtypes are those of whole
tensors, so a checkpoint does not depend on how its tensors were cut. `shards` makes, reads and
verifies them, and `resume_shards` does so at a start, on all ranks. `sharded_save` begins a save on
all ranks, `rank_save` is what follows on each in the background, and `main_file` and
`writer_commit` are what the writer adds. `copies` compares what several ranks hold. `shard_uploads`
sends the files to a bucket, `tier_saves` keeps the newest step in memory, `dcp_folder` and
`dcp_state` read and write what torch.distributed.checkpoint does, and `start_checks` refuses what
could not be saved. How tensors are cut, and how saved state is given the form of live objects,
stands in `../distributed/`: `layout`, `parts`, `reshard`, `data_ranks`.
"""
