"""LoRA adapters are trained here: in JAX with optax, on any model that ``llmjax.load`` returns, packed weights too.

``finetune`` (in ``loop``) does it all; who writes a loop of his own takes its pieces::

    adapter = new_adapter(model, config.lora, seed=config.seed)
    step = train_step(Programs(model, adapter.targets, config), config)
    state = first_state(adapter.factors, config)
    for group in batches(examples, config, epoch=0):
        state, outcome = step(state, group, config.learning_rate)
    save_adapter(adapter.replace(state.factors), "adapter")

``rows`` reads data, ``adapter`` says what is trained, ``batches`` pads, ``step`` computes, ``checkpoints`` resumes.
Not here: what adapters do once they are trained (``llmjax.lora``).
"""
