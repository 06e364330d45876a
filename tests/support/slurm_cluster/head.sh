# Pid 1 of the head: the host that runs munged and slurmctld, where users log in, and whose bridge
# connects the nodes. The PID namespaces of the nodes are inside its own: when it ends, the kernel
# kills every process of the cluster.
# usage: bash head.sh BASE ADDRESS   (started by hosts.start_head)
set -e
[ $$ = 1 ] # not by hand: it changes the host name, and kills all
base=$1 address=$2
read -r pid _ </proc/self/stat # /proc is still the machine's, so this is the pid as seen there
source "${0%/*}/common.sh" head

# Without an address of its own a bridge takes one from its ports, and so changes it.
ip link add br0 address 02:00:00:00:00:01 type bridge
ip addr add "$address/24" dev br0
ip link set br0 up

# munged is ready when its first process returns. --force: do not mind who may write above BASE.
munged --force --key-file="$base/munge/munge.key" --socket="$base/munge/munge.sock" \
    --pid-file="$base/munge/munged.pid" --seed-file="$base/munge/seed" \
    --log-file="$base/log/munged.log"
echo "$pid" >"$base/run/head.pid"

# Standard input is a pipe from the process that wanted the cluster. However that process ends, the
# kernel closes the pipe; then this leaves nothing behind. (A normal end kills this shell instead.)
set +e
while read -r _; do :; done
kill -KILL -1
umount "$base/bin"
rm -rf "$base"
