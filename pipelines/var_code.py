"""CoDe beside plain decoding: the model draws the coarse scales, a smaller one the fine scales.

python pipelines/var_code.py
"""

from pathlib import Path

from varaccel import AutoPipeline, CoDe

pipe = AutoPipeline.from_pretrained("mini-var")
prompt = "a red sphere left of a blue cube at sunset"
plain = pipe(prompt, seed=0)
fast = pipe(prompt, seed=0, accelerator=CoDe("mini-var-small", draft_scales=4))

folder = Path("outputs")
folder.mkdir(exist_ok=True)
plain.images[0].save(folder / "var-code-plain.png")
fast.images[0].save(folder / "var-code.png")
print(plain.stats)
print(fast.stats)
for stage in fast.stats.stages:
    print(f"{stage}, a cache of {stage.cache_bytes / 2**20:.1f} MiB")
