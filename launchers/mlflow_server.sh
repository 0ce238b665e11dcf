#!/usr/bin/env bash
# Start an MLflow server. Runs log to it if MLFLOW_TRACKING_URI=http://HOST:PORT is set.
#   launchers/mlflow_server.sh                                   # 127.0.0.1:5000, SQLite and artifacts in ./mlflow
#   launchers/mlflow_server.sh --port 5001 --folder /data/mlflow
#   launchers/mlflow_server.sh --backend postgresql://user@host/mlflow --artifacts s3://bucket/mlflow
# The last form needs `pip install '.[server]'`; endpoint and keys of the store come from the usual AWS_* variables.
# Arguments after `--` go to `mlflow server`. The server has no password: keep it on 127.0.0.1 or behind a proxy that authenticates.
set -euo pipefail

host=127.0.0.1 port=5000 folder=mlflow backend="" artifacts=""
while [ $# -gt 0 ]; do
  case "$1:${2-}" in
    --host: | --port: | --folder: | --backend: | --artifacts:) echo "error: $1 needs a value; see --help" >&2; exit 2 ;;
  esac
  case "$1" in
    --host) host=$2; shift 2 ;;
    --port) port=$2; shift 2 ;;
    --folder) folder=$2; shift 2 ;;
    --backend) backend=$2; shift 2 ;;
    --artifacts) artifacts=$2; shift 2 ;;
    --) shift; break ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown option $1; see --help" >&2; exit 2 ;;
  esac
done

python=${PYTHON:-}
if [ -z "$python" ]; then
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  python=$here/.venv/bin/python
  [ -x "$python" ] || python=python3
fi
export MLFLOW_DISABLE_TELEMETRY=${MLFLOW_DISABLE_TELEMETRY:-true}
# job runners cost processes and seconds at the start, and training submits no jobs
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:-false}

needs() { # needs MODULE WHAT
  "$python" -c "import $1" 2>/dev/null || { echo "error: $2 needs the Python package $1: pip install '.[server]'" >&2; exit 2; }
}
case $artifacts in s3://*) needs boto3 "--artifacts $artifacts" ;; esac
case $backend in postgresql://*)
  needs psycopg "--backend postgresql://"
  backend=postgresql+psycopg://${backend#postgresql://} ;; # the default driver differs between versions of SQLAlchemy
esac

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
if [ -z "$backend" ]; then
  backend=sqlite:///$folder/mlflow.db
  # created atomically, as by runs that log to a file without a server
  "$python" -c 'import sys; from pathlib import Path; from dalle_ds.tracking.store import create_sqlite_store as make
make(Path(sys.argv[1]))' "$folder/mlflow.db"
fi
# artifacts go through the server (proxied), so that only the server needs credentials of the artifact store
exec "$python" -m mlflow server --host "$host" --port "$port" --backend-store-uri "$backend" \
  --artifacts-destination "${artifacts:-$folder/artifacts}" --serve-artifacts --workers "${MLFLOW_SERVER_WORKERS:-1}" "$@"
