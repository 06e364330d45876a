# What head.sh and node.sh have in common; needs $base. usage: source common.sh NAME
hostname "$1"
mount --bind "$base/etc/hosts.$1" /etc/hosts
mount --bind "$base/etc/nsswitch.conf" /etc/nsswitch.conf
mount --bind "$base/etc/slurm" /etc/slurm
mount -t tmpfs tmpfs /dev/shm
# The commands there enter the cluster from outside. Inside, jobs inherit the PATH but need the
# real ones. This mount is also how hosts.inhabitants recognizes the processes of a cluster.
mount -t tmpfs tmpfs "$base/bin"
ip link set lo up
