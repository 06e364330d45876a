# Pid 1 of a node. It outlives its slurmd, so that "slurmd died" and "the node died" differ.
# usage: bash node.sh BASE NAME ADDRESS PORT HIDDEN   (started by hosts.boot)
set -e
[ $$ = 1 ] # not by hand: it changes the host name
base=$1 name=$2 address=$3 port=$4 hidden=$5
read -r pid _ </proc/self/stat # /proc is still the machine's, so this is the pid as seen there
read -r head_pid <"$base/run/head.pid"
source "${0%/*}/common.sh" "$name"

# The network cable. `netns 1` is this shell; what a power cut left of the old cable may still be
# in its port, or going. The card's address outlives a boot: others still have it in their caches.
mac=$(printf 02:00:00:00:00:%02x "${address##*.}")
nsenter --net="/proc/$head_pid/ns/net" bash -ec "
    ip link delete $port 2>/dev/null || true
    ip link add $port type veth peer name eth0 address $mac netns 1
    ip link set $port master br0 up"
ip addr add "$address/24" dev eth0
ip link set eth0 up

# Whiteouts over /usr/bin: commands that this node does not have.
if [ "$hidden" ]; then
    mount -t overlay overlay -o "lowerdir=$hidden:/usr/bin" /usr/bin
fi
mount -t proc proc /proc
mount -t sysfs sysfs /sys # shows this node's network interfaces
echo "$pid" >"$base/run/$name.pid"

# -b: "this node has booted". Slurm tells a reboot by the uptime, which is the machine's.
slurmd -b -N "$name"
# Opened for reading and writing, a FIFO never ends; bash reaps orphans while it waits.
while :; do read -r _; done <>"$base/run/forever"
