"""Plans of scales beside plain decoding: fewer unconditional rows, pruned tokens, images that end early.

python pipelines/var_scale_plan.py
"""

from pathlib import Path

from varaccel import AutoPipeline, FastVAR, ScalePlan, SkipVAR

pipe = AutoPipeline.from_pretrained("mini-var")
prompt = "a red sphere left of a blue cube at sunset"
plans = {
    "plain": None,
    "unguided": ScalePlan(guided_scales=-3),  # the last three scales run without unconditional rows
    "fast-var": FastVAR(),  # the last two run on 60 % and 50 % of their tokens
    "skip-var": SkipVAR(),  # this image may end early, or lose its guidance
    "several": ScalePlan(guided_scales=-3, keep={-1: 0.5}, cache={-3: 0.5, -2: 0.5}),
}

folder = Path("outputs")
folder.mkdir(exist_ok=True)
for name, plan in plans.items():
    out = pipe(prompt, seed=0, accelerator=plan)
    out.images[0].save(folder / f"var-scale-plan-{name}.png")
    print(out.stats)
    print(f"{name}: a cache of {out.stats.cache_bytes / 2**20:.1f} MiB")
