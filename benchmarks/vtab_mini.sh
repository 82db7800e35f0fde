#!/usr/bin/env bash
# The VTAB-1K table at a small scale: every method of the table, DyT's rates and variants, three seeds. Give a folder; the
# same command goes on where it was stopped. Tasks and workers: TASKS=fields,digits WORKERS=2 benchmarks/vtab_mini.sh OUT
set -euo pipefail
out=${1:?usage: benchmarks/vtab_mini.sh OUT}
mkdir -p "$out"

# The difficulty of the tasks was set while looking at data seed 0, so the table is made on another one.
python - "$out/data" <<'PYTHON'
import sys
from pathlib import Path
from dyntune.data.drawn.vtab_mini import write_vtab_mini

write_vtab_mini(Path(sys.argv[1]), seed=1)
PYTHON

gates=scale=1,rate_of=inference,rate_weight=10
methods=full,linear,adapter,bitfit,lora,vpt,ssf,noah,convpass,adaptformer:scale=1,fact-tt,res-tuning
methods+=,dyt:rate=0.5,$gates,dyt:rate=0.7,$gates,dyt:rate=0.9,$gates
methods+=,dyt:rate=0.5,dispatch=attn,$gates,dyt:rate=0.7,dispatch=attn-mlp,$gates,dyt:rate=0.7,dispatch=layer,$gates
methods+=,dyt:rate=0.5,experts=4,$gates,dyt:rate=0.5,scale=1
for rate in 0.5 0.7 0.9; do methods+=,dyt:rate=$rate,gate_bias=2,$gates; done

dyntune vtab "$out/data" --methods "$methods" --tasks "${TASKS:-fields,digits}" --seeds 1,2,3 --epochs 5 --batch-size 16 \
  --lr 1e-2 --population 16 --generations 4 --workers "${WORKERS:-1}" --device cpu --out "$out/runs"
