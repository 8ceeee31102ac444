"""Files of named tensors, mapped and never unpickled."""
