#!/usr/bin/env bash
# TCOD on ALFWorld inside slime's container: student Qwen3-8B, teacher Qwen3-32B, one node of 8 GPUs of 80 GB.
#   VARIANT=f2b bash examples/tcod/run_qwen3_8b_tcod.sh
#   DRY_RUN=1   bash examples/tcod/run_qwen3_8b_tcod.sh     # print the commands, start nothing
# Each variable can be set in the environment; arguments of the script are appended to train.py's. Running it again
# continues from the last checkpoint in RUN_DIR. tools/launch checks settings, starts the commands, and ends them.
set -euo pipefail
HERE=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
VARIANT_OF='import sys, yaml; print(yaml.safe_load(open(sys.argv[1], "rb")).get("tcod_variant", "f2b"))'
set -a # the settings are exported: tools/launch reads them
# What is trained. CONFIG has the environment and other tcod_* settings; the next variables win over what it says.
CONFIG=${CONFIG:-$HERE/configs/alfworld.yaml}
CONFIG_NAME=$(basename "$CONFIG" .yaml)
VARIANT=${VARIANT:-$(python3 -P -c "$VARIANT_OF" "$CONFIG" 2>/dev/null || echo f2b)} # opd, f2b, b2f, reopd or sft
HORIZON=${HORIZON:-}                                   # largest number of turns
ETA=${ETA:-}                                           # rollouts per turn of depth
TEACHER_SEES=${TEACHER_SEES:-}                         # "demo hindsight" or one: what else the teacher is shown
REWARD_COEF=${REWARD_COEF:-}                           # of the reward beside the KL; SAMPLES_PER_TASK 2 or more
RUN_DIR=${RUN_DIR:-/root/tcod_runs/$CONFIG_NAME-qwen3-8b-$VARIANT} # checkpoints, settings, metrics and logs
# Code and models. A Megatron checkpoint is optional: slime loads Hugging Face's of dense Qwen models itself.
SLIME_DIR=${SLIME_DIR:-$(cd "$HERE/../.." && pwd)}
MEGATRON_DIR=${MEGATRON_DIR:-/root/Megatron-LM}
MODEL_SCRIPT=${MODEL_SCRIPT:-$SLIME_DIR/scripts/models/qwen3-8B.sh} # MODEL_ARGS: the student's shape for Megatron
STUDENT=${STUDENT:-/root/Qwen3-8B}                     # Hugging Face checkpoint
STUDENT_LOAD=${STUDENT_LOAD:-$STUDENT}                 # where Megatron's weights come from
CHAT_TEMPLATE_KWARGS=${CHAT_TEMPLATE_KWARGS:-'{"enable_thinking": false}'} # of the student's chat template
# sglang: a server; self: the student's engines; megatron: in training; none: the reward alone, or VARIANT=sft
TEACHER=${TEACHER:-$([[ $VARIANT == sft ]] && echo none || echo sglang)}
TEACHER_MODEL=${TEACHER_MODEL:-/root/Qwen3-32B}        # Hugging Face checkpoint with the student's tokenizer
TEACHER_LOAD=${TEACHER_LOAD:-$TEACHER_MODEL}           # the same for Megatron, where it is the teacher
TEACHER_URL=${TEACHER_URL:-}                           # an SGLang server that is up, http://HOST:PORT: none is started
TEACHER_HOST=${TEACHER_HOST:-}                         # where it listens: 127.0.0.1, in a cluster this node's address
TEACHER_PORT=${TEACHER_PORT:-13141}
TEACHER_START_S=${TEACHER_START_S:-1800}               # longest start of the teacher
FP32_HEADS=${FP32_HEADS:-0}                            # 1: engines and teacher compute their logits in float32
# How playing and training share time and GPUs; docs/CLUSTER.md compares them.
MODE=${MODE:-sync} # async: rollout n+1 is played while n is trained on; fully_async: episodes go on across rollouts
COLOCATE=${COLOCATE:-$([[ $TEACHER == megatron ]] && echo 1 || echo 0)} # 1: engines on the GPUs that train; MODE=sync
CONCURRENCY=${CONCURRENCY:-}                           # fully_async: tasks per engine at once, by default BATCH in all
# GPUs, numbered within CUDA_VISIBLE_DEVICES: training takes the first ones, then come the student's engines.
RAY_ADDRESS=${RAY_ADDRESS:-}                           # HEAD:PORT of a Ray cluster: several nodes, see docs/CLUSTER.md
ACTOR_NODES=${ACTOR_NODES:-1}                          # nodes that train
ACTOR_GPUS=${ACTOR_GPUS:-$([[ $TEACHER == megatron || $VARIANT == sft ]] && echo 8 || echo 4)} # GPUs on each of them
TENSOR_PARALLEL=${TENSOR_PARALLEL:-}                   # GPUs sharing a layer: ACTOR_GPUS / product of the next two
PIPELINE_PARALLEL=${PIPELINE_PARALLEL:-1}              # GPUs sharing the layers
CONTEXT_PARALLEL=${CONTEXT_PARALLEL:-1}                # GPUs sharing an episode
ROLLOUT_GPUS=${ROLLOUT_GPUS:-}                         # engines: 2; COLOCATE=1: all that train; TEACHER=self, none: 4
ENGINE_GPUS=${ENGINE_GPUS:-1}                          # GPUs of one engine
NODE_GPUS=${NODE_GPUS:-8}                              # most GPUs of engines on one node
TEACHER_GPUS=${TEACHER_GPUS:-$([[ $COLOCATE == 1 ]] && echo 4,5,6,7 || echo 6,7)} # GPUs here of the teacher's server
# All turns of an episode on the engine whose cache holds it. sglang-router 0.3.2 of the package index: cache_aware.
ROUTER_POLICY=${ROUTER_POLICY:-consistent_hashing}
# Data: train.jsonl in DATA_DIR, and for evaluations NAME=FILE.jsonl each, also there or with a whole path.
DATA_DIR=${DATA_DIR:-/root/tcod_$CONFIG_NAME}
if [[ $CONFIG_NAME == alfworld* ]]; then
  EVAL_SETS=${EVAL_SETS-seen=valid_seen.jsonl unseen=valid_unseen.jsonl}
  ALFWORLD_DATA=${ALFWORLD_DATA:-/root/alfworld}       # CONFIG's tcod_data_root: its variable is handed to all workers
fi
EVAL_SETS=${EVAL_SETS:-}                               # none: no evaluations
WORKER_ENV=${WORKER_ENV:-}                             # names of further variables that the environment's workers get
# Training
NUM_ROLLOUT=${NUM_ROLLOUT:-250}                        # rollouts, of one optimizer step each
BATCH=${BATCH:-16}                                     # tasks per rollout
SAMPLES_PER_TASK=${SAMPLES_PER_TASK:-1}
LR=${LR:-1e-6}
MAX_TURN_LEN=${MAX_TURN_LEN:-512}                      # new tokens per turn
MAX_CONTEXT_LEN=${MAX_CONTEXT_LEN:-27648}              # tokens of an episode: 30 turns of 512 + 375, and the rules
EVAL_INTERVAL=${EVAL_INTERVAL:-25}                     # rollouts between evaluations
EVAL_TEMPERATURE=${EVAL_TEMPERATURE:-0.4}              # 1: the teacher's server scores the evaluations too, for the KL
SAVE_INTERVAL=${SAVE_INTERVAL:-25}                     # rollouts between checkpoints, of 14 bytes per parameter
KEEP_CHECKPOINTS=${KEEP_CHECKPOINTS:-last}             # last or all
SAVE_HF=${SAVE_HF:-1}                                  # 1: each is also in RUN_DIR/hf/ROLLOUT, for tools/evaluate.py
WANDB_PROJECT=${WANDB_PROJECT:-}                       # set it to log to Weights & Biases
DRY_RUN=${DRY_RUN:-0}
set +a

die() { echo "$(basename "${BASH_SOURCE[0]}"): $*" >&2; exit 1; }
check() { # PATTERN, WHAT IT IS, NAME..
  for name in "${@:3}"; do [[ ${!name} =~ ^($1)$ ]] || die "$name must be $2, not ${!name}"; done
}
check '|[1-9][0-9]*' 'a positive whole number' HORIZON ETA TEACHER_PORT TEACHER_START_S CONCURRENCY ACTOR_NODES \
  ACTOR_GPUS TENSOR_PARALLEL PIPELINE_PARALLEL CONTEXT_PARALLEL ROLLOUT_GPUS ENGINE_GPUS NODE_GPUS NUM_ROLLOUT BATCH \
  SAMPLES_PER_TASK MAX_TURN_LEN MAX_CONTEXT_LEN EVAL_INTERVAL SAVE_INTERVAL
check '(0|[1-9][0-9]*)(\.[0-9]+)?(e-?[0-9]+)?' 'a number like 0.5' LR EVAL_TEMPERATURE ${REWARD_COEF:+REWARD_COEF}
check '[0-9]+(,[0-9]+)*' 'numbers like 6,7' TEACHER_GPUS
check '0|1' '0 or 1' COLOCATE FP32_HEADS SAVE_HF DRY_RUN
check 'opd|f2b|b2f|reopd|sft' 'opd, f2b, b2f, reopd or sft' VARIANT
check 'sglang|self|megatron|none' 'sglang, self, megatron or none' TEACHER
check 'sync|async|fully_async' 'sync, async or fully_async' MODE
check 'last|all' 'last or all' KEEP_CHECKPOINTS
for name in CONFIG RUN_DIR SLIME_DIR MEGATRON_DIR MODEL_SCRIPT STUDENT STUDENT_LOAD TEACHER_MODEL TEACHER_LOAD \
  DATA_DIR ${ALFWORLD_DATA:+ALFWORLD_DATA}; do
  printf -v "$name" %s "$(realpath -m "${!name}")" # Ray's workers have other working directories
done
: "${TENSOR_PARALLEL:=$((ACTOR_GPUS / (PIPELINE_PARALLEL * CONTEXT_PARALLEL)))}"
if [[ -z $ROLLOUT_GPUS && $TEACHER =~ none|self && $COLOCATE == 0 ]]; then ROLLOUT_GPUS=4; fi # no teacher's server
: "${ROLLOUT_GPUS:=$((COLOCATE ? ACTOR_NODES * ACTOR_GPUS : 2))}"
: "${CONCURRENCY:=$(((BATCH * ENGINE_GPUS + ROLLOUT_GPUS - 1) / ROLLOUT_GPUS))}"

# This folder is a Python package: examples.NAME in slime's examples/, NAME anywhere else.
PACKAGE=$(basename "$HERE")
[[ $PACKAGE =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] ||
  die "the folder $HERE is a Python package: rename it, to ${PACKAGE//[^A-Za-z0-9_]/_} for example"
# slime before Megatron-LM, which has a package of the name examples too.
FOLDERS=$SLIME_DIR:$MEGATRON_DIR
if [[ $HERE -ef $SLIME_DIR/examples/$PACKAGE ]]; then PACKAGE=examples.$PACKAGE; else FOLDERS+=:$(dirname "$HERE"); fi
export PYTHONPATH=$FOLDERS${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TCOD_RUN_DIR=$RUN_DIR CUDA_DEVICE_MAX_CONNECTIONS=1
[[ -f $MODEL_SCRIPT ]] || die "no file $MODEL_SCRIPT: set SLIME_DIR to slime's checkout, or MODEL_SCRIPT"
# shellcheck disable=SC1090
source "$MODEL_SCRIPT"

# The teacher's server; tools/launch adds its length. Small chunks: a chunk's log-probs are a float per token and word.
if [[ -z $TEACHER_HOST && -n $RAY_ADDRESS ]]; then TEACHER_HOST=$(hostname -I | cut -d ' ' -f 1); fi
TEACHER_HOST=${TEACHER_HOST:-127.0.0.1} HOST=$TEACHER_HOST
if [[ $HOST == *:* ]]; then HOST=[$HOST]; fi # IPv6
export TEACHER_ADDRESS=${TEACHER_URL:-http://$HOST:$TEACHER_PORT}
COMMAS=${TEACHER_GPUS//[^,]/}
TEACHER_COMMAND=(
  python3 -m sglang.launch_server --model-path "$TEACHER_MODEL" --host "$TEACHER_HOST" --port "$TEACHER_PORT"
  --tp $((${#COMMAS} + 1)) --chunked-prefill-size 4096 --mem-fraction-static 0.8
  $([[ $FP32_HEADS == 0 ]] || echo --enable-fp32-lm-head)
)
if [[ $TEACHER != sglang || -n $TEACHER_URL ]]; then TEACHER_COMMAND=(); fi # none is started

PROGRAM=train.py HOOKS=$PACKAGE.tcod_rollout
FLAGS=(
  --hf-checkpoint "$STUDENT" --ref-load "$STUDENT_LOAD"
  --load "$RUN_DIR/checkpoints" --save "$RUN_DIR/checkpoints" --save-interval "$SAVE_INTERVAL"
  # the recipe's hooks
  --rollout-function-path "$HOOKS.generate_rollout$([[ $MODE != fully_async ]] || echo _fully_async)"
  --custom-rm-path "$HOOKS.reward_func" --custom-reward-post-process-path "$HOOKS.post_process_rewards"
  --custom-generate-function-path "$HOOKS.generate" --dynamic-sampling-filter-path "$HOOKS.drop_failed"
  --custom-config-path "$RUN_DIR/tcod.yaml"
  # rollouts; tools/launch adds the evaluations
  --prompt-data "$DATA_DIR/train.jsonl" --input-key prompt --label-key label
  --apply-chat-template-kwargs "$CHAT_TEMPLATE_KWARGS" --rollout-shuffle
  --num-rollout "$NUM_ROLLOUT" --rollout-batch-size "$BATCH" --n-samples-per-prompt "$SAMPLES_PER_TASK"
  --global-batch-size $((BATCH * SAMPLES_PER_TASK)) --balance-data
  --rollout-max-response-len "$MAX_TURN_LEN" --rollout-max-context-len "$MAX_CONTEXT_LEN" --rollout-temperature 1
  # the loss; the learning rate is constant, and the override lets a resumed run have another one, or more rollouts
  $([[ $TEACHER == none ]] || echo "--use-opd --opd-type ${TEACHER/self/sglang} --opd-kl-coef 1.0")
  --advantage-estimator grpo --entropy-coef 0.0
  --optimizer adam --lr "$LR" --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98
  --tensor-model-parallel-size "$TENSOR_PARALLEL" --sequence-parallel
  --pipeline-model-parallel-size "$PIPELINE_PARALLEL" --context-parallel-size "$CONTEXT_PARALLEL"
  --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
  --use-dynamic-batch-size --max-tokens-per-gpu $(((MAX_CONTEXT_LEN + CONTEXT_PARALLEL - 1) / CONTEXT_PARALLEL))
  --attention-dropout 0.0 --hidden-dropout 0.0 --attention-softmax-in-fp32 --attention-backend flash
  --accumulate-allreduce-grads-in-fp32 --override-opt-param-scheduler
  # GPUs
  --actor-num-nodes "$ACTOR_NODES" --actor-num-gpus-per-node "$ACTOR_GPUS"
  --rollout-num-gpus "$ROLLOUT_GPUS" --rollout-num-gpus-per-engine "$ENGINE_GPUS" --num-gpus-per-node "$NODE_GPUS"
  --sglang-mem-fraction-static $([[ $COLOCATE == 1 ]] && echo 0.7 || echo 0.8) --router-policy "$ROUTER_POLICY"
  --use-fault-tolerance --rollout-health-check-interval 5
  $([[ $COLOCATE == 0 ]] || echo --colocate) $([[ $FP32_HEADS == 0 ]] || echo --sglang-enable-fp32-lm-head)
  ${WANDB_PROJECT:+--use-wandb --wandb-project "$WANDB_PROJECT" --wandb-group "${RUN_DIR##*/}"}
  ${WANDB_PROJECT:+--disable-wandb-random-suffix}
)
# Megatron deletes all before the last one but multiples of this number, and rollout 0: this many rollouts are none.
if [[ $KEEP_CHECKPOINTS == last ]]; then FLAGS+=(--save-retain-interval $((SAVE_INTERVAL * (NUM_ROLLOUT + 1)))); fi
if [[ $SAVE_HF == 1 ]]; then FLAGS+=(--save-hf "$RUN_DIR/hf/{rollout_id}"); fi
# Imitation: a mean over the tokens of a batch, and no engines.
if [[ $VARIANT == sft ]]; then
  FLAGS+=(--loss-type sft_loss --calculate-per-token-loss --disable-compute-advantages-and-returns --debug-train-only)
fi
if [[ $TEACHER == sglang ]]; then FLAGS+=(--rm-url "$TEACHER_ADDRESS/generate"); fi
if [[ $TEACHER == self ]]; then FLAGS+=(--rm-url self --sglang-chunked-prefill-size 4096); fi
if [[ $TEACHER == megatron ]]; then FLAGS+=(--opd-teacher-load "$TEACHER_LOAD"); fi
if [[ $MODE == fully_async ]]; then FLAGS+=(--sglang-server-concurrency "$CONCURRENCY"); fi
# The weights have moved since a token was sampled: slime weighs its loss by how much likelier it is now, at most 2.
if [[ $MODE != sync ]]; then PROGRAM=train_async.py FLAGS+=(--use-tis); fi
[[ -n $WANDB_PROJECT ]] || unset WANDB_PROJECT # to wandb, an empty one is one

# -P: the current folder is not searched for modules. exec: signals reach it.
exec python3 -P -m "$PACKAGE.tools.launch" "${TEACHER_COMMAND[@]}" -- \
  python3 "$SLIME_DIR/$PROGRAM" "${MODEL_ARGS[@]}" "${FLAGS[@]}" -- "$@"
