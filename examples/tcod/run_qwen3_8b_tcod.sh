#!/usr/bin/env bash
# TCOD on ALFWorld inside slime's container: student Qwen3-8B, teacher Qwen3-32B, one node of 8 GPUs of 80 GB.
#
#   VARIANT=f2b bash examples/tcod/run_qwen3_8b_tcod.sh
#   DRY_RUN=1   bash examples/tcod/run_qwen3_8b_tcod.sh     # print the commands, start nothing
#
# Everything below is set in the environment; arguments of the script are appended to train.py's. Running it again
# continues from the last checkpoint in RUN_DIR, with the same curriculum position and tracking run.
#
# Several nodes: start Ray on each of them, on the teacher's node without the teacher's GPUs
# (CUDA_VISIBLE_DEVICES=0,1,2,3 ray start ...). Then run this on that node, with RAY_ADDRESS=HOST:6379, ACTOR_NODES and
# all paths on storage that every node sees. Ray's workers get the variables of RAY_ENV below from this script.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# The arm. The other tcod_* settings are those of CONFIG.
VARIANT=${VARIANT:-f2b}                                # opd, f2b or b2f
CONFIG=${CONFIG:-$HERE/configs/alfworld_$VARIANT.yaml}
HORIZON=${HORIZON:-}                                   # largest number of turns, instead of CONFIG's tcod_horizon
ETA=${ETA:-}                                           # rollouts per turn of depth, instead of CONFIG's tcod_eta
RUN_DIR=${RUN_DIR:-/root/tcod_runs/qwen3-8b-$VARIANT}  # checkpoints, settings, metrics and logs of this run
# Code and models. A Megatron checkpoint is optional: slime loads Hugging Face's of dense Qwen models itself.
SLIME_DIR=${SLIME_DIR:-$(cd "$HERE/../.." && pwd)}
MEGATRON_DIR=${MEGATRON_DIR:-/root/Megatron-LM}
MODEL_SCRIPT=${MODEL_SCRIPT:-$SLIME_DIR/scripts/models/qwen3-8B.sh} # MODEL_ARGS: the student's shape for Megatron
STUDENT=${STUDENT:-/root/Qwen3-8B}                     # Hugging Face checkpoint
STUDENT_LOAD=${STUDENT_LOAD:-$STUDENT}                 # where Megatron's weights come from
TEACHER=${TEACHER:-sglang}                             # sglang: a server; megatron: in the training processes
TEACHER_MODEL=${TEACHER_MODEL:-/root/Qwen3-32B}        # Hugging Face checkpoint with the student's tokenizer
TEACHER_LOAD=${TEACHER_LOAD:-$TEACHER_MODEL}           # the same for Megatron, where it is the teacher
TEACHER_URL=${TEACHER_URL:-}                           # an SGLang server that is up, http://HOST:PORT: none is started
TEACHER_HOST=${TEACHER_HOST:-}                         # where it listens: 127.0.0.1, in a cluster this node's address
TEACHER_PORT=${TEACHER_PORT:-13141}
TEACHER_START_S=${TEACHER_START_S:-1800}               # longest start of the teacher
# GPUs, numbered within CUDA_VISIBLE_DEVICES: training takes the first ones, then come the student's engines.
ACTOR_NODES=${ACTOR_NODES:-1}                          # nodes that train
ACTOR_GPUS=${ACTOR_GPUS:-4}                            # GPUs on each of them
TENSOR_PARALLEL=${TENSOR_PARALLEL:-$ACTOR_GPUS}        # GPUs that share one copy of the model in training
ROLLOUT_GPUS=${ROLLOUT_GPUS:-2}                        # GPUs of the student's engines, on all nodes together
TEACHER_GPUS=${TEACHER_GPUS:-6,7}                      # GPUs here of the teacher's server
# All turns of an episode on the engine whose cache holds it. The router of slime's container can; the public one,
# sglang-router 0.3.2, cannot: cache_aware.
ROUTER_POLICY=${ROUTER_POLICY:-consistent_hashing}
# Data
export ALFWORLD_DATA=${ALFWORLD_DATA:-/root/alfworld}  # holds json_2.1.1/
DATA_DIR=${DATA_DIR:-/root/tcod_alfworld}              # train.jsonl, valid_seen.jsonl, valid_unseen.jsonl
# Training
NUM_ROLLOUT=${NUM_ROLLOUT:-250}                        # rollouts, of one optimizer step each
BATCH=${BATCH:-16}                                     # tasks per rollout
SAMPLES_PER_TASK=${SAMPLES_PER_TASK:-1}
LR=${LR:-1e-6}
MAX_TURN_LEN=${MAX_TURN_LEN:-512}                      # new tokens per turn
MAX_CONTEXT_LEN=${MAX_CONTEXT_LEN:-16384}              # tokens of a whole episode
EVAL_INTERVAL=${EVAL_INTERVAL:-25}                     # rollouts between evaluations
EVAL_TEMPERATURE=${EVAL_TEMPERATURE:-0.4}              # 1: the teacher's server scores the evaluations too, for the KL
SAVE_INTERVAL=${SAVE_INTERVAL:-25}                     # rollouts between checkpoints
WANDB_PROJECT=${WANDB_PROJECT:-}                       # set it to log to Weights & Biases
DRY_RUN=${DRY_RUN:-0}

die() {
  echo "run_qwen3_8b_tcod.sh: $*" >&2
  exit 1
}

# ------------------------------------------------------------------------------------------- settings that contradict
case $VARIANT in opd | f2b | b2f) ;; *) die "VARIANT must be opd, f2b or b2f, not $VARIANT" ;; esac
case $TEACHER in sglang | megatron) ;; *) die "TEACHER must be sglang or megatron, not $TEACHER" ;; esac
for name in HORIZON ETA TEACHER_PORT TEACHER_START_S ACTOR_NODES ACTOR_GPUS TENSOR_PARALLEL ROLLOUT_GPUS NUM_ROLLOUT \
  BATCH SAMPLES_PER_TASK MAX_TURN_LEN MAX_CONTEXT_LEN EVAL_INTERVAL SAVE_INTERVAL; do
  [[ -z ${!name} || ${!name} =~ ^[1-9][0-9]*$ ]] || die "$name must be a positive whole number, not ${!name}"
done
for name in CONFIG RUN_DIR SLIME_DIR MEGATRON_DIR MODEL_SCRIPT STUDENT STUDENT_LOAD TEACHER_MODEL TEACHER_LOAD \
  ALFWORLD_DATA DATA_DIR; do
  printf -v "$name" %s "$(realpath -m "${!name}")" # Ray's workers have other working directories
done
[[ -f $CONFIG ]] || die "no file $CONFIG: set CONFIG to a YAML of tcod_* settings"
grep -Eq "^tcod_variant: *$VARIANT *(#.*)?$" "$CONFIG" || die "$CONFIG is not for VARIANT=$VARIANT: change one of them"
[[ -z $ETA || $VARIANT != opd ]] || die "ETA is the speed of a curriculum and VARIANT=opd has none: unset ETA"
((MAX_TURN_LEN < MAX_CONTEXT_LEN)) ||
  die "MAX_TURN_LEN $MAX_TURN_LEN is one turn of MAX_CONTEXT_LEN $MAX_CONTEXT_LEN: make it smaller"
((ACTOR_GPUS % TENSOR_PARALLEL == 0)) || die "TENSOR_PARALLEL $TENSOR_PARALLEL must divide ACTOR_GPUS $ACTOR_GPUS"
COPIES=$((ACTOR_NODES * ACTOR_GPUS / TENSOR_PARALLEL))
((BATCH * SAMPLES_PER_TASK % COPIES == 0)) ||
  die "BATCH x SAMPLES_PER_TASK must be a multiple of $COPIES, ACTOR_NODES x ACTOR_GPUS / TENSOR_PARALLEL"
[[ $ACTOR_NODES == 1 || -n ${RAY_ADDRESS:-} ]] || die "ACTOR_NODES is $ACTOR_NODES: set RAY_ADDRESS to the nodes' Ray"
if [[ $TEACHER == megatron ]]; then
  [[ -z $TEACHER_URL ]] || die "TEACHER=megatron asks no server: unset TEACHER_URL"
elif [[ -n $TEACHER_URL ]]; then
  [[ $TEACHER_URL =~ ^https?://[^/]+$ ]] || die "TEACHER_URL must be http://HOST:PORT, not $TEACHER_URL"
else
  [[ $TEACHER_GPUS =~ ^[0-9]+(,[0-9]+)*$ ]] || die "TEACHER_GPUS must be numbers like 6,7, not $TEACHER_GPUS"
  if [[ -z ${RAY_ADDRESS:-} ]]; then
    for gpu in ${TEACHER_GPUS//,/ }; do
      ((gpu >= ACTOR_GPUS + ROLLOUT_GPUS)) ||
        die "GPU $gpu of TEACHER_GPUS is taken: ACTOR_GPUS + ROLLOUT_GPUS are 0 to $((ACTOR_GPUS + ROLLOUT_GPUS - 1))"
    done
  fi
fi

# ----------------------------------------------------------------------------------------------------------- commands
# What is set above replaces the line of CONFIG; the result is the run's own RUN_DIR/tcod.yaml.
SETTINGS=$(<"$CONFIG")
replace() {
  SETTINGS=$(grep -v "^$1:" <<<"$SETTINGS" && echo "$1: $2")
}
if [[ -n $HORIZON ]]; then replace tcod_horizon "$HORIZON"; fi
if [[ -n $ETA ]]; then replace tcod_eta "$ETA"; fi
if [[ $EVAL_TEMPERATURE == 1 && $TEACHER == sglang ]]; then replace tcod_eval_kl true; fi

MODEL_ARGS=()
[[ -f $MODEL_SCRIPT ]] || die "no file $MODEL_SCRIPT: set SLIME_DIR to slime's checkout, or MODEL_SCRIPT"
# shellcheck disable=SC1090
source "$MODEL_SCRIPT"
TEACHER_COMMAND=()
if [[ $TEACHER == sglang && -z $TEACHER_URL ]]; then
  if [[ -z $TEACHER_HOST && -n ${RAY_ADDRESS:-} ]]; then TEACHER_HOST=$(hostname -I | cut -d ' ' -f 1); fi
  TEACHER_HOST=${TEACHER_HOST:-127.0.0.1}
  TEACHER_URL=http://$TEACHER_HOST:$TEACHER_PORT
  # 7 tokens more than an episode: SGLang keeps them. Small chunks: the log-probs of a chunk are a float per vocabulary
  # entry and token.
  TEACHER_COMMAND=(
    python3 -m sglang.launch_server --model-path "$TEACHER_MODEL" --host "$TEACHER_HOST" --port "$TEACHER_PORT"
    --tp "$(awk -F, '{print NF}' <<<"$TEACHER_GPUS")" --context-length $((MAX_CONTEXT_LEN + 7))
    --chunked-prefill-size 4096 --mem-fraction-static 0.8
  )
fi
if [[ $TEACHER == sglang ]]; then
  OPD_ARGS=(--use-opd --opd-type sglang --rm-url "$TEACHER_URL/generate")
else
  # Without --offload-train slime pushes the teacher's weights to the engines first.
  OPD_ARGS=(--use-opd --opd-type megatron --opd-teacher-load "$TEACHER_LOAD" --offload-train)
fi
CKPT_ARGS=(
  --hf-checkpoint "$STUDENT" --ref-load "$STUDENT_LOAD"
  --load "$RUN_DIR/checkpoints" --save "$RUN_DIR/checkpoints" --save-interval "$SAVE_INTERVAL"
)
TCOD_ARGS=(
  --rollout-function-path tcod_rollout.generate_rollout
  --custom-generate-function-path tcod_rollout.generate
  --custom-rm-path tcod_rollout.reward_func
  --custom-reward-post-process-path tcod_rollout.post_process_rewards
  --dynamic-sampling-filter-path tcod_rollout.drop_failed
  --custom-rollout-log-function-path tcod_log.log_rollout
  --custom-eval-rollout-log-function-path tcod_log.log_eval
  --custom-config-path "$RUN_DIR/tcod.yaml"
)
ROLLOUT_ARGS=(
  --prompt-data "$DATA_DIR/train.jsonl" --input-key prompt --label-key label
  --apply-chat-template-kwargs '{"enable_thinking": false}' --rollout-shuffle
  --num-rollout "$NUM_ROLLOUT" --rollout-batch-size "$BATCH" --n-samples-per-prompt "$SAMPLES_PER_TASK"
  --global-batch-size $((BATCH * SAMPLES_PER_TASK)) --balance-data
  --rollout-max-response-len "$MAX_TURN_LEN" --rollout-max-context-len "$MAX_CONTEXT_LEN" --rollout-temperature 1
)
EVAL_ARGS=(
  --eval-interval "$EVAL_INTERVAL" --n-samples-per-eval-prompt 1
  --eval-prompt-data seen "$DATA_DIR/valid_seen.jsonl" unseen "$DATA_DIR/valid_unseen.jsonl"
  --eval-temperature "$EVAL_TEMPERATURE" --eval-top-p 1 --eval-max-response-len "$MAX_TURN_LEN"
)
# The learning rate is constant; the override lets a resumed run have another one, or more rollouts.
TRAIN_ARGS=(
  --advantage-estimator grpo --opd-kl-coef 1.0 --entropy-coef 0.0
  --optimizer adam --lr "$LR" --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98
  --override-opt-param-scheduler
  --tensor-model-parallel-size "$TENSOR_PARALLEL" --sequence-parallel
  --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
  --use-dynamic-batch-size --max-tokens-per-gpu "$MAX_CONTEXT_LEN"
  --attention-dropout 0.0 --hidden-dropout 0.0 --attention-softmax-in-fp32 --attention-backend flash
  --accumulate-allreduce-grads-in-fp32
)
CLUSTER_ARGS=(
  --actor-num-nodes "$ACTOR_NODES" --actor-num-gpus-per-node "$ACTOR_GPUS" --rollout-num-gpus "$ROLLOUT_GPUS"
  --rollout-num-gpus-per-engine 1 --sglang-mem-fraction-static 0.8 --router-policy "$ROUTER_POLICY"
)
WANDB_ARGS=()
if [[ -n $WANDB_PROJECT ]]; then
  WANDB_ARGS=(--use-wandb --wandb-project "$WANDB_PROJECT" --wandb-group "$(basename "$RUN_DIR")")
  WANDB_ARGS+=(--disable-wandb-random-suffix)
fi
TRAIN_COMMAND=(
  python3 "$SLIME_DIR/train.py" "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${TCOD_ARGS[@]}" "${OPD_ARGS[@]}"
  "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${CLUSTER_ARGS[@]}" "${WANDB_ARGS[@]}" "$@"
)

# slime and its workers need these, on every node; PYTHONPATH is slime, Megatron and the recipe.
export PYTHONPATH=$HERE:$MEGATRON_DIR:$SLIME_DIR${PYTHONPATH:+:$PYTHONPATH}
export TCOD_RUN_DIR=$RUN_DIR CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONUNBUFFERED=1
no_proxy=localhost,127.0.0.1,$(hostname -I | xargs | tr ' ' ,),${no_proxy:-${NO_PROXY:-}} # for engines and teacher
export no_proxy
RAY_ENV=(PYTHONPATH ALFWORLD_DATA TCOD_RUN_DIR CUDA_DEVICE_MAX_CONNECTIONS PYTHONUNBUFFERED no_proxy)

# From GPU numbers to what CUDA_VISIBLE_DEVICES takes.
VISIBLE=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd , || true)
VISIBLE=${CUDA_VISIBLE_DEVICES:-$VISIBLE}
IFS=, read -ra GPUS <<<"$VISIBLE"
devices() {
  local number names=()
  for number in "$@"; do names+=("${GPUS[number]:-$number}"); done
  (IFS=, && echo "${names[*]}")
}
# shellcheck disable=SC2086
TEACHER_DEVICES=$(devices ${TEACHER_GPUS//,/ })
# Without a cluster Ray starts here, even beside another one, on the GPUs of training and rollouts.
if [[ -z ${RAY_ADDRESS:-} ]]; then
  # shellcheck disable=SC2046
  TRAIN_ENV=(RAY_ADDRESS=local "CUDA_VISIBLE_DEVICES=$(devices $(seq 0 $((ACTOR_GPUS + ROLLOUT_GPUS - 1))))")
else
  TRAIN_ENV=("RAY_ADDRESS=$RAY_ADDRESS")
fi

print_commands() {
  local name
  printf "mkdir -p %q\ncat >%q <<'END'\n%s\nEND\n" "$RUN_DIR" "$RUN_DIR/tcod.yaml" "$SETTINGS"
  for name in "${RAY_ENV[@]}"; do printf 'export %s=%q\n' "$name" "${!name}"; done
  if ((${#TEACHER_COMMAND[@]})); then
    printf '%q ' "CUDA_VISIBLE_DEVICES=$TEACHER_DEVICES" "${TEACHER_COMMAND[@]}" && echo '&'
  fi
  printf 'export %q\n' "${TRAIN_ENV[@]}"
  printf '%q ' "${TRAIN_COMMAND[@]}" && echo
}
if [[ $DRY_RUN == 1 ]]; then
  print_commands
  exit 0
fi

# ----------------------------------------------------------------------------------------- checks before a GPU is used
[[ -f $SLIME_DIR/train.py ]] || die "no train.py in $SLIME_DIR: set SLIME_DIR to slime's checkout"
[[ -d $MEGATRON_DIR/megatron ]] || die "no Megatron-LM in $MEGATRON_DIR: set MEGATRON_DIR to its checkout"
[[ -f $STUDENT/config.json ]] || die "no config.json in $STUDENT: set STUDENT to the student's Hugging Face checkpoint"
is_checkpoint() {
  [[ -f $1/latest_checkpointed_iteration.txt ]] || compgen -G "$1/*.safetensors" >/dev/null
}
is_checkpoint "$STUDENT_LOAD" ||
  die "no weights in $STUDENT_LOAD: set STUDENT_LOAD to a Megatron checkpoint or to safetensors of Hugging Face"
if [[ $TEACHER == megatron ]]; then
  is_checkpoint "$TEACHER_LOAD" ||
    die "no weights in $TEACHER_LOAD: set TEACHER_LOAD to a Megatron checkpoint or to safetensors of Hugging Face"
fi
if [[ $TEACHER == megatron ]] || ((${#TEACHER_COMMAND[@]})); then
  [[ -f $TEACHER_MODEL/config.json ]] ||
    die "no config.json in $TEACHER_MODEL: set TEACHER_MODEL to the teacher's Hugging Face checkpoint"
fi
[[ -d $ALFWORLD_DATA/json_2.1.1 ]] ||
  die "no json_2.1.1 in $ALFWORLD_DATA: run alfworld-download, or set ALFWORLD_DATA"
for split in train valid_seen valid_unseen; do
  [[ -s $DATA_DIR/$split.jsonl ]] || die "no $split.jsonl in $DATA_DIR: run prepare_alfworld.py, or set DATA_DIR"
done
NEEDED=0
if [[ -z ${RAY_ADDRESS:-} ]]; then NEEDED=$((ACTOR_GPUS + ROLLOUT_GPUS)); fi
if ((${#TEACHER_COMMAND[@]})); then
  for gpu in ${TEACHER_GPUS//,/ }; do ((NEEDED > gpu)) || NEEDED=$((gpu + 1)); done
  if (: <"/dev/tcp/$TEACHER_HOST/$TEACHER_PORT") 2>/dev/null; then
    die "port $TEACHER_PORT of $TEACHER_HOST is taken: set TEACHER_PORT, or TEACHER_URL if that is the teacher"
  fi
fi
((${#GPUS[@]} >= NEEDED)) ||
  die "$NEEDED GPUs are needed and ${#GPUS[@]} visible: change ACTOR_GPUS, ROLLOUT_GPUS or TEACHER_GPUS"
CHECKPOINT=$(cat "$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || true)
if [[ -n $CHECKPOINT && -f $RUN_DIR/tcod.yaml && $SETTINGS != "$(<"$RUN_DIR/tcod.yaml")" ]]; then
  die "$RUN_DIR/tcod.yaml has other settings than this run: take them back, or set another RUN_DIR"
fi

# ---------------------------------------------------------------------------------------------------------- processes
# Each process that this script starts leads a session of its own, so that stopping it reaches all that it started.
SESSIONS=()
start() {
  setsid "$@" &
  SESSIONS+=("$!")
}
# In the background, because a signal would otherwise be handled only when the command has ended.
check() {
  start python3 "$HERE/preflight.py" "$@"
  wait "$!" || exit 1
  unset 'SESSIONS[-1]'
}
stop() {
  local sessions pids i
  trap '' INT TERM HUP
  sessions=$(IFS=, && echo "${SESSIONS[*]}")
  [[ -n $sessions ]] || return 0
  # train.py takes its Ray down when it is asked to end, SGLang its workers; what is left of them goes then.
  pids=$(jobs -pr)
  disown -a # or the shell reports how each of them ended
  # shellcheck disable=SC2086
  kill -TERM $pids 2>/dev/null || true
  for ((i = 0; i < 150; i++)); do
    # shellcheck disable=SC2086
    kill -0 $pids 2>/dev/null || break
    sleep 0.1
  done
  pkill -TERM -s "$sessions" || return 0
  for ((i = 0; i < 30; i++)); do
    pgrep -s "$sessions" >/dev/null || return 0
    sleep 0.1
  done
  pkill -KILL -s "$sessions" || true
}
trap stop EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

LOGS=$RUN_DIR/logs/$(date +%Y%m%d-%H%M%S)
mkdir -p "$LOGS"
if [[ -z $CHECKPOINT && -f $RUN_DIR/metrics.jsonl ]]; then mv "$RUN_DIR/metrics.jsonl" "$LOGS/metrics-before.jsonl"; fi
echo "$SETTINGS" >"$RUN_DIR/tcod.yaml"
print_commands >"$LOGS/command.sh"
if [[ -n $CHECKPOINT ]]; then echo "$RUN_DIR continues from checkpoint $CHECKPOINT"; else echo "$RUN_DIR starts"; fi
echo "logs: $LOGS"

RUN_CHECKS=(--config "$RUN_DIR/tcod.yaml" --data "$DATA_DIR" --student "$STUDENT")
if [[ $TEACHER == megatron ]]; then RUN_CHECKS+=(--megatron-teacher "$TEACHER_MODEL"); fi
if [[ -n ${RAY_ADDRESS:-} ]]; then RUN_CHECKS+=(--ray-gpus $((ACTOR_NODES * ACTOR_GPUS + ROLLOUT_GPUS))); fi
check run "${RUN_CHECKS[@]}"

teacher_failed() {
  tail -n 30 "$LOGS/teacher.log" >&2
  die "the teacher $1: above is the end of $LOGS/teacher.log"
}
TEACHER_PID=
if ((${#TEACHER_COMMAND[@]})); then
  echo "starting the teacher on GPUs $TEACHER_DEVICES"
  start env "CUDA_VISIBLE_DEVICES=$TEACHER_DEVICES" "${TEACHER_COMMAND[@]}" >"$LOGS/teacher.log" 2>&1
  TEACHER_PID=$!
  DEADLINE=$((SECONDS + TEACHER_START_S))
  until curl -sf --max-time 5 --noproxy '*' -o /dev/null "$TEACHER_URL/health_generate"; do
    kill -0 "$TEACHER_PID" 2>/dev/null || teacher_failed "ended before it was ready"
    ((SECONDS < DEADLINE)) || teacher_failed "was not ready within TEACHER_START_S=$TEACHER_START_S seconds"
    sleep 1
  done
fi
if [[ $TEACHER == sglang ]]; then
  check teacher --url "$TEACHER_URL/generate" --student "$STUDENT" --context-len "$MAX_CONTEXT_LEN"
fi

if [[ -n $WANDB_PROJECT ]]; then # slime passes no run id
  [[ -s $RUN_DIR/wandb_run_id ]] || echo "tcod-$(date +%s)-$RANDOM" >"$RUN_DIR/wandb_run_id"
  WANDB_RUN_ID=$(<"$RUN_DIR/wandb_run_id")
  export WANDB_RUN_ID WANDB_RESUME=allow
fi
# How `ray job submit` hands its runtime environment to the program: as variables of all workers, on all nodes.
RAY_JOB_CONFIG_JSON_ENV_VAR=$(
  python3 - "${RAY_ENV[@]}" "${!NCCL_@}" "${!GLOO_@}" "${!WANDB_@}" <<'END'
import json, os, sys
variables = {name: os.environ[name] for name in sys.argv[1:] if name in os.environ}
print(json.dumps({"runtime_env": {"env_vars": variables}}))
END
)
export RAY_JOB_CONFIG_JSON_ENV_VAR
start env "${TRAIN_ENV[@]}" "${TRAIN_COMMAND[@]}" >"$LOGS/train.log" 2>&1
TRAIN_PID=$!
tail -n +1 -f --pid="$TRAIN_PID" "$LOGS/train.log" &
TAIL_PID=$!
STATUS=0
# shellcheck disable=SC2086
wait -n "$TRAIN_PID" $TEACHER_PID || STATUS=$?
if kill -0 "$TRAIN_PID" 2>/dev/null; then teacher_failed "ended while it was needed"; fi
wait "$TAIL_PID" || true
((STATUS == 0)) || die "training ended with status $STATUS: see $LOGS/train.log"
