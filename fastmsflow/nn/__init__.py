"""The modules of the model: positional encoding, subnets, coupling block, parallel and fusion flow, extractor."""
