"""From text to training windows.

Data flow one way: corpus -> tokenizer -> token files -> windows -> batches. On this way a text passes these units:

    document    one text of a corpus; it never sees another document
    part        what a corpus reads in one go, such as a file; parts are tokenised by several processes
    text batch  some documents of a part, tokenised at once (`tokens.encoding`)
    piece       tokens of a part, about a shard of them; it survives a kill (`tokens.tokenize_part`)
    shard       one file of a token file's folder, joined from pieces
    token file  the folder of a split: shards, offsets of the documents, tokenizer, manifest
    stream      the documents in the order of an epoch, each behind a separator
    window      `seq_len` tokens of the stream, with their targets and the document of each: a row
    batch       the rows of one optimizer step that one process takes

`TrainingData` is the interface to training and evaluation. `TokenData` (one corpus), `MixtureData`, `PreparedData`,
`GivenTokens`, `NeedleData` and `SyntheticData` implement it. Token files of other programs (`tokens.layouts`) have an
index of their documents (`tokens.placed`) in the place of pieces and shards.
"""
