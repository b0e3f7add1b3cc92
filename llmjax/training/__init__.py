"""LoRA adapters are trained here: in JAX with optax, on any model that ``llmjax.load`` returns, packed weights too.

``finetune`` (in ``loop``) does it all; who writes a loop of his own takes its pieces::

    import llmjax
    from llmjax.training.adapter import new_adapter
    from llmjax.training.batches import batches
    from llmjax.training.files import save_adapter
    from llmjax.training.rows import make_examples
    from llmjax.training.step import Programs, first_state, train_step

    model = llmjax.load("smollm2")
    config = llmjax.TrainConfig(rank=8, learning_rate=1e-3)
    examples = make_examples([{"prompt": "2 and 2:", "completion": " 4"}], model).examples
    adapter = new_adapter(model, config.lora, seed=config.seed)
    step = train_step(Programs(model, adapter.targets, config), config)
    state = first_state(adapter.factors, config)
    for epoch in range(3):
        for group in batches(examples, config, epoch):
            state, outcome = step(state, group, config.learning_rate)
            print(f"step {state.step}: loss {outcome.loss:.4f}")
    save_adapter(adapter.replace(state.factors), "adapter", "smollm2")

``step.loss`` is the loss alone, a pure function of the factors: for gradients of one's own.

``lines`` and ``rows`` read data, ``adapter`` says what is trained, ``batches`` pads, ``step`` computes, ``preferences``
has the loss of pairs, ``checkpoints`` resumes.
Not here: what adapters do once they are trained (``llmjax.lora``).
"""
