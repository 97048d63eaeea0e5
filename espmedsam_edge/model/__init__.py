"""The networks, as torch modules: encoder, controller, prompt generator, decoder, teacher, checkpoints."""
