#!/bin/sh
# Builds the guest image: OUTDIR/vmlinuz and OUTDIR/initrd.img (default target/image).
#
#   build.sh [--refresh] [OUTDIR]
#
# Everything comes from Debian's or Ubuntu's packages, downloaded and verified by apt-get into
# OUTDIR/cache and unpacked there; nothing is installed. Without --refresh, packages are looked up
# anew only when the recipe has changed.
set -eu
export LC_ALL=C
umask 022

recipe=$(cd "$(dirname "$0")" && pwd)
refresh=
case ${1-} in
--refresh) refresh=1; shift ;;
-*) echo "usage: build.sh [--refresh] [OUTDIR]" >&2; exit 2 ;;
esac
out=${1:-target/image}
limit_mib=32

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
inputs=$({ cd "$recipe" && find agent.sh build.sh kernel.sh modules rootfs -type f -print0 | sort -z | xargs -0 sha256sum; sha256sum <"$agent"; } | sha256sum | cut -d' ' -f1)
if [ -z "$refresh" ] && [ -s "$out/vmlinuz" ] && [ -s "$out/initrd.img" ] &&
    [ "$(cat "$out/inputs" 2>/dev/null)" = "$inputs" ]; then
    say "up to date: $out"
    exit 0
fi

for tool in apt-get apt-cache dpkg sha256sum awk; do
    command -v "$tool" >/dev/null || die "$tool is missing: build on Debian or Ubuntu"
done

began=$(now)
mkdir -p "$out/cache"
out=$(cd "$out" && pwd)
work=$(mktemp -d "$out/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
root=$work/root
image=$work/image
mkdir -p "$root" "$image"

say "looking up packages"
find_kernel
tools="busybox-static wireguard-tools nftables"
packages="$kernel $(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
    --no-replaces --no-enhances $tools | grep '^[a-z]')"
fetch $packages
busybox=$(ls "$root/bin/busybox" "$root/usr/bin/busybox" 2>/dev/null | head -n 1)
[ -n "$busybox" ] || die "busybox-static holds no busybox"

say "collecting programs"
for directory in bin lib lib64 lib/modules etc dev proc sys run tmp root usr/bin usr/lib/omerta var/log; do
    mkdir -p "$image/$directory"
done
ln -s bin "$image/sbin"
ln -s ../bin "$image/usr/sbin"
cp "$busybox" "$image/bin/busybox"
"$busybox" --list | while read -r applet; do
    [ "$applet" = busybox ] || ln -s busybox "$image/bin/$applet"
done
# The packages' own loader says which libraries a program needs, whatever the host has.
loader=$(readlink -f "$(ls "$root"/lib64/ld-linux-x86-64.so.2 "$root"/usr/lib64/ld-linux-x86-64.so.2 2>/dev/null | head -n 1)")
case $loader in
"$root"/*) ;;
*) loader=$(find "$root" -name 'ld-linux-x86-64.so.2' -type f | head -n 1) ;;
esac
libraries=$(find "$root" -type d -name x86_64-linux-gnu -path '*lib/x86_64-linux-gnu' | paste -sd:)
for program in wg nft; do
    path=$(ls "$root"/usr/bin/$program "$root"/usr/sbin/$program "$root"/sbin/$program 2>/dev/null | head -n 1)
    [ -n "$path" ] || die "the packages hold no $program"
    cp -L "$path" "$image/bin/$program"
    "$loader" --library-path "$libraries" --list "$path" >"$work/needed" || die "$program lacks a library"
    awk '$2 == "=>" { print $3 }' "$work/needed" | while read -r library; do
        case $library in
        "$root"/*) cp -L "$library" "$image/lib/${library##*/}" ;;
        *) die "$program would take $library from the host" ;;
        esac
    done
done
cp -L "$loader" "$image/lib64/ld-linux-x86-64.so.2"

collect_modules "$recipe/modules"

say "packing"
cp -R "$recipe/rootfs/." "$image/"
cp "$agent" "$image/bin/omerta-agent"
# A clone has the modes of whoever made it.
chmod -R u=rwX,go=rX "$image"
chmod 755 "$image/init" "$image/bin/omerta-agent" "$image/usr/lib/omerta/"* "$image/etc/acpi/PWRF/"*
pack

total=$(($(stat -c %s "$work/vmlinuz") + $(stat -c %s "$work/initrd.img")))
[ "$total" -le $((limit_mib << 20)) ] || die "the image has $total bytes, more than $limit_mib MiB"
rm -f "$out/inputs"
# For who builds another image with it; and it tells that this one has it.
cp "$agent" "$work/omerta-agent"
mv "$work/omerta-agent" "$out/omerta-agent"
# It tells that the firewall is heard on the console.
: >"$out/firewall-log"
mv "$work/vmlinuz" "$work/initrd.img" "$out/"
echo "$inputs" >"$out/inputs"
seconds=$(awk -v from="$began" -v to="$(now)" 'BEGIN { printf "%.1f", to - from }')
say "done in $seconds s: $out/vmlinuz $(mib "$out/vmlinuz"), $out/initrd.img $(mib "$out/initrd.img")"
