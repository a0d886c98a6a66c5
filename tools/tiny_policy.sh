#!/usr/bin/env bash
# The shipped policy from nothing: `make tiny-policy` runs this in the repository's folder. Each stage runs only if what
# it makes is missing, and training goes on from its newest checkpoint, so it may be stopped and started again.
set -euo pipefail

run=runs/tiny_policy
jobs=$(nproc)

stage() { printf '\n[tiny-policy %(%H:%M:%S)T] %s\n' -1 "$1"; }

if [ ! -d $run/demos ]; then
  stage "1/9 demonstrations and play on 320 simulated bodies: $run/demos"
  python3 -m selfalign_core.data.sim_demos --output $run/demos --bodies 320 --episodes 6 --nominal-episodes 48 \
    --frames 36 --seed 1 --jobs "$jobs"
fi

if [ ! -d $run/pretrained ]; then
  stage "2/9 the vision tower learns to see, the language model to read: $run/pretrained"
  python3 -m selfalign_core.training.pretrain --output $run/pretrained --jobs "$jobs"
fi

stage "3/9 joint training of the three experts, one E-Token per body: $run/joint"
python3 -m selfalign_core.train --config config/training/tiny_policy.yaml --resume

# The same seed, so that the bodies of the first stage are among them and keep their tokens; other episodes, so that what
# this stage holds out is nothing that the first one trained on.
if [ ! -d $run/many_demos ]; then
  stage "4/9 four times as many bodies: $run/many_demos"
  python3 -m selfalign_core.data.sim_demos --output $run/many_demos --bodies 1280 --episodes 8 --nominal-episodes 48 \
    --frames 36 --seed 1 --episodes-seed 2 --jobs "$jobs"
fi

stage "5/9 joint training goes on with all of them: $run/many"
python3 -m selfalign_core.train --config config/training/tiny_policy_many.yaml --resume

# Bodies that none of the stages before has seen, as those that it will meet.
if [ ! -d $run/aligned_demos ]; then
  stage "6/9 demonstrations and play on 512 other bodies: $run/aligned_demos"
  python3 -m selfalign_core.data.sim_demos --output $run/aligned_demos --bodies 513 --episodes 8 --nominal-episodes 48 \
    --frames 36 --seed 3 --jobs "$jobs"
fi

if [ ! -f $run/aligned_tokens.safetensors ]; then
  stage "7/9 the token that alignment finds for each of them: $run/aligned_tokens.safetensors"
  python3 -m selfalign_core.training.aligned_tokens $run/many/policy $run/aligned_demos \
    --output $run/aligned_tokens.safetensors --jobs "$jobs"
fi

stage "8/9 the action expert learns to act on such tokens: $run/aligned"
python3 -m selfalign_core.train --config config/training/tiny_policy_aligned.yaml --resume

if [ ! -f $run/evaluation.json ]; then
  stage "9/9 200 closed-loop episodes: $run/evaluation.json"
  python3 -m selfalign_core.evaluate $run/aligned/policy --json $run/evaluation.json --gif $run/evaluation.gif
fi

cat <<END

The policy is in $run/aligned/policy. To see it:  make bringup ARGS='checkpoint:=$run/aligned/policy'
To ship it, so that 'make bringup' runs it:        cp -L $run/aligned/policy/* policies/tiny_reach/
END
