#!/bin/sh
# Builds the Debian image: OUTDIR/vmlinuz, OUTDIR/initrd.img and OUTDIR/disk.qcow2 (default target/debian).
#
#   debian.sh [--refresh] [OUTDIR]
#
# Everything comes from Debian's packages, verified by apt. Root: mmdebstrap makes the tree in a file system in memory, and
# mke2fs the disk from it; nothing is mounted on a loop device. Equal packages give an equal image.
set -eu
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
umask 022

recipe=$(cd "$(dirname "$0")" && pwd)
refresh=
case ${1-} in
--refresh) refresh=1; shift ;;
-*) echo "usage: debian.sh [--refresh] [OUTDIR]" >&2; exit 2 ;;
esac
out=${1:-target/debian}
suite=bookworm
mirror=http://deb.debian.org/debian
security=http://deb.debian.org/debian-security
disk_mib=2048
# Times of files, of the file system, and what its random numbers are made of: any that never change.
export SOURCE_DATE_EPOCH=1700000000
uuid=6f6d6572-7461-4564-8000-64656269616e

# shellcheck source=vm-launcher/image/kernel.sh
. "$recipe/kernel.sh"
# shellcheck source=vm-launcher/image/agent.sh
. "$recipe/agent.sh"

say() { printf 'image: %s\n' "$*"; }
die() { printf 'image: %s\n' "$*" >&2; exit 1; }
now() { cut -d' ' -f1 /proc/uptime; }
mib() { awk -v bytes="$(stat -c %s "$1")" 'BEGIN { printf "%.1f MiB", bytes / 1048576 }'; }

[ "$(uname -m)" = x86_64 ] || die "cannot build on $(uname -m): the guest image is for x86_64 alone"
find_agent
inputs=$({ cd "$recipe" && find agent.sh debian.sh kernel.sh debian rootfs -type f -print0 | sort -z | xargs -0 sha256sum; sha256sum <"$agent"; } | sha256sum | cut -d' ' -f1)
if [ -z "$refresh" ] && [ -s "$out/vmlinuz" ] && [ -s "$out/initrd.img" ] && [ -s "$out/disk.qcow2" ] &&
    [ "$(cat "$out/inputs" 2>/dev/null)" = "$inputs" ]; then
    say "up to date: $out"
    exit 0
fi

[ "$(id -u)" = 0 ] || die "building the Debian image takes root, for its files' owners"
for tool in mmdebstrap/mmdebstrap qemu-img/qemu-utils mke2fs/e2fsprogs debugfs/e2fsprogs unshare/util-linux; do
    command -v "${tool%/*}" >/dev/null || die "${tool%/*} is missing: apt-get install ${tool#*/}"
done

# In a mount namespace of its own, so that the file system in memory goes with it.
if [ -z "${OMERTA_IMAGE_INSIDE-}" ]; then
    exec unshare --mount --propagation private env OMERTA_IMAGE_INSIDE=1 OMERTA_AGENT="$agent" "$0" ${refresh:+--refresh} "$out"
fi

began=$(now)
mkdir -p "$out/cache"
out=$(cd "$out" && pwd)
work=$(mktemp -d "$out/build.XXXXXX")
trap 'umount "$work" 2>/dev/null; rmdir "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mount -t tmpfs -o mode=755,size=3g omerta-image "$work"
root=$work/packages
image=$work/image
tree=$work/tree
mkdir -p "$root" "$image" "$tree"

say "looking up packages"
find_kernel
fetch "$kernel" busybox-static
busybox=$(ls "$root/bin/busybox" "$root/usr/bin/busybox" 2>/dev/null | head -n 1)
[ -n "$busybox" ] || die "busybox-static holds no busybox"

say "making the tree (some minutes)"
mmdebstrap --quiet --mode=root --variant=essential --include="$(sed '/^#/d' "$recipe/debian/packages" | paste -sd,)" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/info/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    "$suite" "$work/tree.tar" "deb $mirror $suite main" "deb $mirror $suite-updates main" \
    "deb $security $suite-security main" >"$work/mmdebstrap.log" 2>&1 || { cat "$work/mmdebstrap.log" >&2; die "mmdebstrap failed"; }
# In mmdebstrap's order, which is by name: the order in which a directory was filled shows in the disk.
tar -C "$tree" -xf "$work/tree.tar"
rm "$work/tree.tar"

say "adding what makes it a guest"
modules=$(find "$root" -type d -path "*lib/modules/$version" | head -n 1)
mkdir -p "$tree/usr/lib/modules"
cp -R "$modules" "$tree/usr/lib/modules/"
chroot "$tree" depmod "$version"
mkdir -p "$tree/usr/lib/omerta" "$tree/etc/omerta"
cp -R "$recipe/debian/rootfs/." "$tree/"
cp "$recipe/rootfs/usr/lib/omerta/facts" "$recipe/rootfs/usr/lib/omerta/network" "$recipe/rootfs/usr/lib/omerta/report" \
    "$recipe/rootfs/usr/lib/omerta/follow" "$tree/usr/lib/omerta/"
cp "$recipe/rootfs/etc/omerta/firewall.nft" "$tree/etc/omerta/"
cp "$agent" "$tree/usr/lib/omerta/omerta-agent"
chmod 755 "$tree/usr/lib/omerta/"*
chmod 644 "$tree/etc/systemd/system/omerta-"*.service "$tree/etc/cloud/cloud.cfg.d/90_omerta.cfg" "$tree/etc/modules-load.d/omerta.conf" \
    "$tree/etc/systemd/network/10-cloud-init-eth0.network.d/omerta.conf" "$tree/usr/lib/omerta/facts" "$tree/usr/lib/omerta/network"
systemctl --root="$tree" --quiet enable omerta-firewall.service omerta-tunnel.service omerta-agent.service omerta-console.service systemd-networkd.service
systemctl --root="$tree" --quiet mask serial-getty@ttyS0.service getty@tty1.service apt-daily.timer apt-daily-upgrade.timer \
    e2scrub_all.timer fstrim.timer dpkg-db-backup.timer systemd-networkd-wait-online.service
# Each guest has its own.
rm -f "$tree"/etc/ssh/ssh_host_* "$tree/var/lib/dbus/machine-id" "$tree/var/lib/systemd/random-seed"
: >"$tree/etc/machine-id"
echo guest >"$tree/etc/hostname"
rm -f "$tree/etc/resolv.conf"
: >"$tree/etc/resolv.conf"
# What tells when and where it was built.
rm -rf "$tree"/var/log/* "$tree"/var/cache/* "$tree"/var/lib/apt/lists/* "$tree"/tmp/* "$tree"/run/*
find "$tree" -name __pycache__ -prune -exec rm -rf {} +
find "$tree" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
find "$tree" -exec touch -h -a -d "@$SOURCE_DATE_EPOCH" {} +

say "making the disk"
export E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH
mke2fs -q -t ext4 -L omerta -U "$uuid" -m 1 -J size=16 -E "hash_seed=$uuid,lazy_itable_init=0,root_owner=0:0" -d "$tree" \
    "$work/disk.raw" "${disk_mib}M"
# mke2fs takes the times of change from the tree, and those cannot be set there.
(cd "$tree" && find . -printf '%P\n' | sort | awk -v at="@$SOURCE_DATE_EPOCH" '{ gsub(/"/, "\"\""); printf "sif \"/%s\" ctime %s\n", $0, at }') >"$work/times"
debugfs -w -f "$work/times" "$work/disk.raw" >"$work/debugfs.log" 2>&1 || { tail "$work/debugfs.log" >&2; die "debugfs failed"; }
e2fsck -fn "$work/disk.raw" >"$work/fsck.log" 2>&1 || { cat "$work/fsck.log" >&2; die "the disk is not sound"; }
qemu-img convert -q -m 1 -c -f raw -O qcow2 "$work/disk.raw" "$work/disk.qcow2"
rm "$work/disk.raw"

mkdir -p "$image/bin" "$image/lib/modules" "$image/dev" "$image/proc" "$image/sys" "$image/root"
cp "$busybox" "$image/bin/busybox"
"$busybox" --list | while read -r applet; do
    [ "$applet" = busybox ] || ln -s busybox "$image/bin/$applet"
done
collect_modules "$recipe/debian/modules"
cp "$recipe/debian/initrd/init" "$image/init"
chmod -R u=rwX,go=rX "$image"
chmod 755 "$image/init"
say "packing"
pack

rm -f "$out/inputs"
cp "$work/vmlinuz" "$work/initrd.img" "$work/disk.qcow2" "$out/"
# For who builds another image with it; and it tells that this one has it.
cp "$agent" "$out/omerta-agent"
: >"$out/firewall-log"
echo "$inputs" >"$out/inputs"
seconds=$(awk -v from="$began" -v to="$(now)" 'BEGIN { printf "%.1f", to - from }')
say "done in $seconds s: $out/vmlinuz $(mib "$out/vmlinuz"), $out/initrd.img $(mib "$out/initrd.img"), $out/disk.qcow2 $(mib "$out/disk.qcow2")"
