# Source this file (bash, zsh) to work in the environment that `make` uses:
#   . tools/env.sh
# It prepares the environment first if that has not been done.

if [ -n "${BASH_SOURCE:-}" ]; then _selfalign_file="${BASH_SOURCE[0]}"; else _selfalign_file="$0"; fi
_selfalign_exports="$(python3 "$(dirname "$_selfalign_file")/bootstrap.py" env)" && eval "$_selfalign_exports"
unset _selfalign_file _selfalign_exports
