"""Models as folders of the Hugging Face libraries: safetensors, config and tokenizer, out of longmix and into it.

python -m longmix.interop.huggingface export CHECKPOINT FOLDER
python -m longmix.interop.huggingface import FOLDER CHECKPOINT

A model of which transformers knows the type (`llama`) is written as that type, and needs nothing of longmix. Any other
is written as type `longmix`: importing this package makes it known to transformers, and no remote code is run.

    import longmix.interop.huggingface
    model = AutoModelForCausalLM.from_pretrained(FOLDER)

Needs `pip install 'longmix[interop]'`.
"""

from importlib.util import find_spec

if find_spec("transformers") is not None:
    from longmix.interop.huggingface.model import register

    register()
