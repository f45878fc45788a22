"""The parts of the model: position code, subnets, coupling block, parallel and fusion flow, extractor."""
