"""What people call features: files, Neuronpedia, groups."""
