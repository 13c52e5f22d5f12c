"""What a forward pass saves for the backward pass."""


def storage_sizes(network, sizes):
    """A hook for saved tensors that notes the bytes of every storage but the parameters' in ``sizes``, each once."""
    own = {p.untyped_storage()._cdata for p in network.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    return note
