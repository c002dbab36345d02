"""A model one layer at a time: the weights of one layer in memory, and between two layers a text's hidden states.

- `Step` (`step`): one layer, run by the backbone's own forward pass; `steps_of` returns all of them. `weights_of`
  (`weights`) puts in a step's weights; on a CPU routed experts stay on disk, and each is read when it is computed.
- `Stream` (`stream`): one model on one text. `Stream.advance` takes the text's hidden states through one step, chunk
  after chunk, in place or from one tensor into another: in memory, or in a mapped file, as the caller has made it.
- `Visitor` (`stream`): what else happens at a step, by a context around each chunk and a method that receives what
  goes in and out.
- `walk_layers` (`walk`): one folder per finished layer, so that interrupted work continues with the layer under way. Of a job's
  ranks each takes its own rows (`ranks`: `share_of`) through the layers, with a file of its own for their hidden states.
- `SideBySide` (`side_by_side`): two streams in step, the teacher's advanced and the student's changed (`LayerChange`).

Calibration walks one stream with a visitor; the teacher cache advances one, without folders, shard after shard; refit
and healing are two kinds of `LayerChange`; the depth search advances several hidden states through one stream.
"""
