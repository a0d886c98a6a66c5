# Every target prepares what it needs (see tools/bootstrap.py): on a machine with ROS 2 sourced it uses that, elsewhere
# it makes .venv with the ROS 2 wheels. Nothing has to be set up beforehand.

SHELL := /bin/bash
PYTHON ?= python3
BOOTSTRAP := $(PYTHON) tools/bootstrap.py
PYTEST_WORKERS ?= 2

BAG ?=
DURATION ?=
REPORT ?=
PARAMS ?=
AGAINST ?=
AGAINST_CHECKPOINT ?=
ARGS ?=
CONFIG ?= config/training/example.yaml
CHECKPOINT ?= policies/tiny_reach

# These are text, whatever is in it: make does not expand it, and the shell gets it in quotes as one word. (ARGS is words
# for the shell.) An option is there if its text is.
TEXTS := BAG DURATION REPORT PARAMS AGAINST AGAINST_CHECKPOINT CONFIG CHECKPOINT
define NEWLINE


endef
CHECKPOINT_IS_GIVEN := $(filter command environment,$(origin CHECKPOINT))
$(foreach name,$(TEXTS),$(eval override $(name) := $$(value $(name))))
$(foreach name,$(TEXTS),$(if $(findstring $(NEWLINE),$($(name))),$(error $(name): found several lines, expected one)))
quoted = '$(subst ','\'',$($(1)))'
option = $(if $($(2)),$(1)$(call quoted,$(2)))

.DEFAULT_GOAL := help
.PHONY: help build bringup record replay train evaluate tiny-policy train-step held-out ablations adaptation
.PHONY: adaptation-seeds adaptation-in-graph handover image-path latency align-speed interference pipeline soak faults sros2-policies test test-long motion-property lint docs clean clean-all

help:  ## show this text
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  DURATION=30       seconds after which bringup or record stops by itself"
	@echo "  REPORT=out.json   where bringup or replay writes its report (a .png goes next to it)"
	@echo "  PARAMS=my.yaml    ROS parameter file with values that differ from config/parameters.yaml"
	@echo "  BAG=directory     bag to record or to replay"
	@echo "  AGAINST=my.yaml   replay a second time with this parameter file, or with the policy AGAINST_CHECKPOINT=DIR,"
	@echo "                    and print, write and draw what differs (REPORT, default runs/replay/comparison.json)"
	@echo "  CONFIG=my.yaml    what to train (default: "$(call quoted,CONFIG)")"
	@echo "  CHECKPOINT=DIR    policy to evaluate (default: "$(call quoted,CHECKPOINT)") or to replay"
	@echo "  ARGS='...'        more arguments: NAME:=VALUE for bringup (checkpoint:=DIR runs another policy),"
	@echo "                    KEY=VALUE for train, options for the others"

build:  ## prepare the environment and build the interfaces
	@$(BOOTSTRAP)

bringup:  ## start the simulated robot and the three nodes
	@$(BOOTSTRAP) launch bringup $(call option,duration:=,DURATION) $(call option,report:=,REPORT) \
	  $(call option,params_file:=,PARAMS) $(ARGS)

record:  ## record a run as a bag: BAG=directory DURATION=20
	@$(if $(BAG),,$(error make record needs BAG=directory))$(BOOTSTRAP) run python3 -m selfalign_ros.tools.record \
	  $(call option,--output=,BAG) $(call option,--duration=,DURATION) $(call option,--params=,PARAMS) $(ARGS)

# CHECKPOINT counts only when it was given: otherwise that of the parameters is replayed.
replay:  ## play a bag through the same nodes, in lock-step: BAG=directory, AGAINST=other.yaml compares
	@$(if $(BAG),,$(error make replay needs BAG=directory))$(BOOTSTRAP) run python3 -m selfalign_ros.tools.replay \
	  $(call option,bag:=,BAG) $(call option,--report=,REPORT) $(call option,--params=,PARAMS) \
	  $(if $(CHECKPOINT_IS_GIVEN),$(call option,--checkpoint=,CHECKPOINT)) \
	  $(call option,--against=,AGAINST) $(call option,--against-checkpoint=,AGAINST_CHECKPOINT) $(ARGS)

train:  ## train a policy: CONFIG=my.yaml ARGS='--resume data.path=DATASET'
	@$(BOOTSTRAP) run python3 -m selfalign_core.train --config $(call quoted,CONFIG) $(ARGS)

evaluate:  ## closed-loop episodes in the simulator: CHECKPOINT=directory
	@$(BOOTSTRAP) run python3 -m selfalign_core.evaluate $(call quoted,CHECKPOINT) $(ARGS)

tiny-policy:  ## make the shipped policy from nothing (about two and a half hours on 2 cores), in runs/tiny_policy
	@$(BOOTSTRAP) run tools/tiny_policy.sh

# Studies. One thread each: they run side by side, and their work is too small to split.
train-step: export OMP_NUM_THREADS := 1
train-step:  ## time and memory of a training step with and without the alignment expert
	@$(BOOTSTRAP) run python3 -m benchmarks.speed.train_step --json runs/train_step.json $(ARGS)

held-out: export OMP_NUM_THREADS := 1
held-out:  ## losses on recordings and bodies never trained on, before and after: of a run of make tiny-policy
	@[ -d runs/tiny_policy/unseen ] || $(BOOTSTRAP) run python3 -m selfalign_core.data.sim_demos \
	  --output runs/tiny_policy/unseen --bodies 17 --episodes 4 --frames 36 --seed 77
	@$(BOOTSTRAP) run python3 -m benchmarks.studies.held_out runs/tiny_policy/joint --bodies runs/tiny_policy/unseen \
	  --json runs/held_out.json $(ARGS)

ablations: export OMP_NUM_THREADS := 1
ablations:  ## training without its parts, one after another (about 2 hours); starts from that of make tiny-policy
	@$(BOOTSTRAP) run python3 -m benchmarks.studies.ablations --config config/training/tiny_policy.yaml \
	  --output runs/ablations $(ARGS)

adaptation: export OMP_NUM_THREADS := 1
adaptation:  ## unseen bodies with and without alignment: CHECKPOINT=directory
	@$(BOOTSTRAP) run python3 -m benchmarks.studies.adaptation $(call quoted,CHECKPOINT) --output runs/adaptation $(ARGS)

adaptation-seeds: export OMP_NUM_THREADS := 1
adaptation-seeds:  ## the study's arms for three seeds of the training, in a reduced setting (two to three hours of a core)
	@$(BOOTSTRAP) run python3 -m benchmarks.studies.adaptation.seeds --output runs/adaptation_seeds $(ARGS)

adaptation-in-graph:  ## a body that changes in the running graph, or that it never saw; to 2.5 minutes a run: ARGS='--shifts servo'
	@$(BOOTSTRAP) run python3 -m benchmarks.studies.adaptation.in_graph --output runs/in_graph $(ARGS)

image-path: export OMP_NUM_THREADS := 1
image-path:  ## time per camera frame from message to model input, against plain cv2
	@$(BOOTSTRAP) run python3 -m benchmarks.speed.image_path --json benchmarks/results/image_path.json $(ARGS)

latency: export OMP_NUM_THREADS := 1
latency:  ## time of an action chunk stage by stage, plain and fast, beside the least time: ARGS='--device cuda'
	@$(BOOTSTRAP) run python3 -m benchmarks.speed.latency --checkpoint $(call quoted,CHECKPOINT) --json runs/latency.json $(ARGS)

align-speed: export OMP_NUM_THREADS := 1
align-speed:  ## time and memory of an alignment step, against a joint pass of the whole model
	@$(BOOTSTRAP) run python3 -m benchmarks.speed.align_speed --checkpoint $(call quoted,CHECKPOINT) --json runs/align_speed.json $(ARGS)

interference: export OMP_NUM_THREADS := 1
interference:  ## latencies of the policy with alignment off, at 1 Hz and without pause
	@$(BOOTSTRAP) run python3 -m benchmarks.speed.interference --checkpoint $(call quoted,CHECKPOINT) \
	  --json runs/interference.json $(ARGS)

pipeline: export OMP_NUM_THREADS := 1
pipeline:  ## from a camera's message to the robot's command: what is not the model
	@$(BOOTSTRAP) run python3 -m benchmarks.speed.pipeline --checkpoint $(call quoted,CHECKPOINT) --json runs/pipeline.json $(ARGS)

soak:  ## simulated operation at real rates, an hour unless DURATION=seconds: memory flat, no chunk missed
	@$(BOOTSTRAP) run python3 -m benchmarks.studies.soak $(call option,--duration=,DURATION) $(ARGS)

handover: export OMP_NUM_THREADS := 1
handover:  ## jerk, stalls and success per hand-over between chunks, at injected latencies: CHECKPOINT=directory
	@$(BOOTSTRAP) run python3 -m benchmarks.studies.handover $(call quoted,CHECKPOINT) --json runs/handover.json $(ARGS)

faults:  ## SIGKILL and SIGSTOP of every node at random times, 50 kills: judged at the simulated robot
	@$(BOOTSTRAP) run python3 -m benchmarks.studies.faults $(ARGS)

sros2-policies:  ## write config/sros2/policies.xml anew, from the running nodes (docs/sros2.md)
	@$(BOOTSTRAP) run python3 -m selfalign_ros.tools.security_policy --output config/sros2/policies.xml \
	  contract:=contracts/sim_arm.yaml checkpoint:=tiny $(ARGS)

lint:  ## ruff, its formatter, what each room may import, types
	@$(BOOTSTRAP) run python3 -m ruff check .
	@$(BOOTSTRAP) run python3 -m ruff format --check -q .
	@$(BOOTSTRAP) run lint-imports
	@$(BOOTSTRAP) run python3 -m mypy

docs:  ## the documentation with the API reference as HTML, in out/docs
	@$(BOOTSTRAP) run python3 -m pip install -q --disable-pip-version-check -r requirements-docs.txt -c constraints.txt
	@$(BOOTSTRAP) run python3 -m sphinx -b html -q -W --keep-going docs out/docs
	@echo out/docs/index.html

# First the tests without nodes, side by side, then those that start nodes (marked in test/conftest.py), one after the
# other, so that no two graphs share the cores. Exit code 5 of pytest means that ARGS selected none of that kind.
test: export ROS_AUTOMATIC_DISCOVERY_RANGE := LOCALHOST
test: export OMP_NUM_THREADS := 1
test: export HF_HUB_OFFLINE := 1
test: lint  ## lint and every test
	@$(BOOTSTRAP) run python3 -m pytest -n $(PYTEST_WORKERS) -m "not ros" $(ARGS); core=$$?; \
	if [ $$core -ne 0 ] && [ $$core -ne 5 ]; then exit $$core; fi; \
	$(BOOTSTRAP) run python3 -m pytest -m "ros and not long" $(ARGS); graph=$$?; \
	if [ $$graph -eq 5 ] && [ $$core -eq 0 ]; then exit 0; fi; exit $$graph

motion-property:  ## what motion promises, over 2,000 random runs of 200 steps (a quarter of an hour)
	@MOTION_RUNS=2000 MOTION_STEPS=200 $(BOOTSTRAP) run python3 -m pytest test/core/test_motion.py -k TestAnyOrder \
	  --timeout 0 $(ARGS)

test-long: export ROS_AUTOMATIC_DISCOVERY_RANGE := LOCALHOST
test-long: export OMP_NUM_THREADS := 1
test-long:  ## nodes that are stopped, an aligner on another machine, behind a cut link and a router: minutes
	@$(BOOTSTRAP) run python3 -m pytest -m long $(ARGS)

clean:  ## remove what was built and every cache; keeps installed packages
	rm -rf build install log .venv/build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -f .bootstrap.lock .venv/selfalign-stamp.json
	find . -path ./.venv -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf

clean-all: clean  ## remove .venv as well
	rm -rf .venv
