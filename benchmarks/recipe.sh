#!/usr/bin/env bash
# What each part of the recipe of dispatch does, and whether it holds elsewhere: three tasks of vtab-mini, three seeds. Give a
# folder that benchmarks/vtab_mini.sh has written its data to; the same command goes on where it was stopped.
set -euo pipefail
out=${1:?usage: benchmarks/recipe.sh OUT}
tasks=${TASKS:-digits,materials,shapes_count}

table() {  # folder, methods, further options
  local folder=$1 methods=$2
  shift 2
  dyntune vtab "$out/data" --tasks "$tasks" --methods "$methods" --seeds 1,2,3 --workers "${WORKERS:-1}" --device cpu \
    --out "$out/recipe/$folder" "$@"
}

dyt=dyt:rate=0.5
without=$dyt,$dyt,gate_bias=0,$dyt,course=0/0,rate_weight=10,$dyt,quiet=0.85,$dyt,quiet=none,$dyt,moves=none,$dyt,rate_of=training,$dyt,rate_weight=2,$dyt,rate_weight=10,$dyt,lead=none,$dyt,spread=none
without+=,$dyt,explore=none,$dyt,surrogate=none,$dyt,recipe=published,scale=1
without+=,$dyt,complete_during=0/1,$dyt,complete_during=0.2/0.6,$dyt,complete_during=0.6/1,$dyt,feature_weight=0,$dyt,complete_every=2,$dyt,complete_weight=0,$dyt,complete_weight=0,distill_weight=0,feature_weight=0
table parts "$without" --epochs 5 --batch-size 16 --lr 5e-3
table lr-1e-2 "adaptformer:scale=1,$dyt" --epochs 5 --batch-size 16 --lr 1e-2
table lr-1e-3 "adaptformer:scale=1,$dyt" --epochs 5 --batch-size 16 --lr 1e-3
table epochs-3 "adaptformer:scale=1,$dyt" --epochs 3 --batch-size 16 --lr 5e-3
table epochs-20 "adaptformer:scale=1,$dyt" --epochs 20 --batch-size 16 --lr 5e-3
table batch-64 "adaptformer:scale=1,$dyt" --epochs 10 --batch-size 64 --lr 5e-3
table others "dyt:rate=0.3/0.9,adaptformer:scale=1+tome:r=2,$dyt+tome:r=2,dyt:rate=0.5,experts=4" --epochs 5 --batch-size 16 --lr 5e-3
