#!/usr/bin/env bash
# Runs a deployment and prints its answer while it is generated. Where the connection breaks, it goes on at the next chunk.
#   examples/curl.sh [query] [deployment] [server]        needs bash and curl, nothing else
set -u
# In another locale bash does not make characters of \u escapes.
[[ $(locale charmap 2>/dev/null) == UTF-8 ]] || export LC_ALL=C.UTF-8

query=${1:-${QUERY:-My last invoice is wrong. What can I do?}}
deployment=${2:-${DEPLOYMENT:-support-desk}}
server=${3:-${SERVER:-http://127.0.0.1:8000}}

json() { # a text as JSON
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"} text=${text//$'\n'/\\n} text=${text//$'\r'/\\r} text=${text//$'\t'/\\t}
  printf '"%s"' "$text"
}

connect() { # prints the headers and the events of one connection; curl leaves out a header without a value
  curl --silent --no-buffer --include --header 'Content-Type: application/json' \
    --header "Idempotency-Key: $key" --header "Last-Event-ID: $last_event_id" \
    --data-binary "{\"deployment_name\": $(json "$deployment"), \"query\": $(json "$query")}" \
    "$server/api/workflows/execute/stream"
}

say() { # the text of a JSON string; its escapes are those of %b, but for \"
  printf '%b' "${1//\\\"/\\x22}"
}

handle() { # one chunk, a line of JSON
  local data='"data":"(([^"\\]|\\.)*)"' error='"error":"(([^"\\]|\\.)*)"' status='"status":"([a-z]+)"'
  if [[ $1 == *'"type":"content"'* && $1 =~ $data ]]; then
    say "${BASH_REMATCH[1]}"
  elif [[ $1 =~ $status ]]; then
    case ${BASH_REMATCH[1]} in
      completed) echo && exit 0 ;;
      cancelled) echo && echo '[cancelled]' >&2 && exit 1 ;;
      error) [[ $1 =~ $error ]] && echo && say "[${BASH_REMATCH[1]}]\n" >&2 && exit 1 ;;
      restarted) printf '\n[started again: what this agent said before is void]\n' >&2 ;;
    esac
  fi
}

# What makes the request safe to repeat: the key until the first event is there, then the id of the last one.
key=$(od -An -N16 -tx1 /dev/urandom) key=${key//[[:space:]]/}
last_event_id=''
for ((failures = 0; failures < 10; failures++)); do
  id='' data='' code=0
  while IFS= read -r line || [[ -n $line ]]; do
    line=${line%$'\r'}
    case $line in
      HTTP/*) code=${line#* } code=${code%% *} ;;
      'id: '*) id=${line#id: } ;;
      'data: '*) data=${line#data: } ;;
      '{'*) problem=$line ;;
      '') # the end of an event, or of the headers
        [[ -n $data ]] || continue
        last_event_id=$id failures=0
        handle "$data"
        data=''
        ;;
    esac
  done < <(connect)
  case $code in
    204) exit 0 ;; # nothing comes after the last event
    4*) echo "${problem:-}" >&2 && exit 1 ;;
  esac
  printf '\n[no connection]\n' >&2
  sleep 1
done
echo "$server can not be reached." >&2
exit 1
