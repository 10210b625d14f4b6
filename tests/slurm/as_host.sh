#!/bin/bash
# as_host.sh HOSTS NAME command...: runs a command under a host's name, with the file HOSTS as /etc/hosts; see
# check_hosts.sh, which gives it the namespaces for both.
set -euo pipefail
mount --bind "$1" /etc/hosts
hostname "$2"
exec "${@:3}"
