#!/usr/bin/env bash
# The VTAB-1K table at a small scale: every method of the table, DyT's rates and variants, six tasks, three seeds. Give a folder;
# the same command goes on where it was stopped. Some tasks, or two at a time: TASKS=fields,digits WORKERS=2 benchmarks/vtab_mini.sh OUT
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

table() {  # folder, epochs, methods, seeds
  dyntune vtab "$out/data" --methods "$3" --seeds "$4" --epochs "$2" ${TASKS:+--tasks "$TASKS"} --batch-size 16 --lr 5e-3 \
    --population 16 --generations 4 --workers "${WORKERS:-1}" --device cpu --out "$out/$1"
}

dyt=dyt:rate=0.5,dyt:rate=0.7,dyt:rate=0.9,dyt:rate=0.3,dyt:rate=0.7,dispatch=attn-mlp
table runs 5 "adaptformer:scale=1,$dyt" 1,2,3
# Ten epochs too, for five are too few for these tasks; DyT also with the complete model in every step.
ten=dyt:rate=0.5,dyt:rate=0.7,dyt:rate=0.9,dyt:rate=0.3,dyt:rate=0.5,complete_during=0/1
table runs-10-epochs 10 "adaptformer:scale=1,$ten" 1,2,3
others=full,linear,adapter,bitfit,lora,vpt,ssf,convpass,fact-tt,res-tuning
variants=adaptformer:bottleneck=32,scale=1,dyt:rate=0.5,bottleneck=32,dyt:rate=0.5,dispatch=attn,dyt:rate=0.7,dispatch=layer,dyt:rate=0.5,experts=4,dyt:rate=0.5,recipe=published,scale=1
table runs 5 "$others,$variants" 1,2,3  # into the same folder, whose table has all that is in it
table runs 5 noah 1
