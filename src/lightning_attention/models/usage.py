"""How to load a checkpoint: the section of its model card, in a folder or on the Hub."""

INSTALL = "pip install 'lightning-attention[{extra}]'"
PLAIN = """\
With transformers, which imports the installed library if it may (`trust_remote_code`); after
`import lightning_attention.models` it need not:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```"""
ADAPTERS = """\
With PEFT, which loads the base model too:

```python
import lightning_attention.models
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```"""
DOWNLOAD = """\
The library itself takes a folder:

```bash
{downloads}
```

"""
ENGINE = """\
With the engine, for many requests at a time:

```python
from lightning_attention.inference import Engine, SamplingOptions, encode, load

model, tokenizer = load("{folder}")
engine = Engine(model)
prompts = [encode(tokenizer, text) for text in ("Once", "The")]
for completion in engine.run(prompts, SamplingOptions(max_new_tokens=20)):
    print(tokenizer.decode(completion.tokens))
```

On the command line:

```bash
lightning-attention generate --checkpoint {folder} --prompt "Once"
```"""


def usage(name: str | None, base: str | None, has_adapters: bool) -> str:
    """Section of a model card on how to load a checkpoint.

    Args:
        name: name of its repository on the Hub; None for the current folder.
        base: name on the Hub of the model that adapters are for.
        has_adapters: True for a checkpoint of LoRA adapters.
    """
    install = INSTALL.format(extra="finetune" if has_adapters else "models,cli")
    parts = ["## Use", f"```bash\n{install}\n```", (ADAPTERS if has_adapters else PLAIN).format(name=name or ".")]
    if name is None:
        return "\n\n".join(
            [*parts[:2], "All of this runs in the folder of this file.", parts[2], ENGINE.format(folder=".")]
        )
    folder = name.rpartition("/")[2]
    downloads = [f"hf download {name} --local-dir {folder}"]
    if has_adapters:  # which name their base model, found as a folder
        downloads.append(f"hf download {base} --local-dir {base}")
    return "\n\n".join([*parts, DOWNLOAD.format(downloads="\n".join(downloads)) + ENGINE.format(folder=folder)])
