# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The program that runs in the guest: a POSIX shell script that Proxmox hands to ``sh`` through the guest agent.

The script needs a shell (dash, bash, busybox), coreutils or busybox, and ``setsid`` of util-linux or busybox. It is
sent with each request, as input; the only arguments are ``BOOT`` and the script's length. So neither the guest's
process list nor its journal (qemu-ga logs every command line) shows a value of the user.

All values are ASCII: a user's text travels as base64. A script that was cut off runs nothing, because ``BOOT`` checks
its length before the shell evaluates it.

One run has one folder, ``/run/agentlab/ID`` (mode 0700; /var/run or /tmp where the agent may not write to /run):

| file | what it holds |
|---|---|
| ``sup`` | process id and start time of the supervisor |
| ``pid`` | process id of the command, which leads a session and process group of its own |
| ``job``, ``do``, ``in`` | switch of the user, the command as shell text, its standard input; removed at the end |
| ``out``, ``err`` | the output, at most ``max_output`` bytes each; ``out.cut``, ``err.cut``: there was more |
| ``full`` | there was no room in /run for all of the output |
| ``end`` | room for ``rc``, taken before the command starts |
| ``late``, ``killed`` | the time-out, or a request, ended the command |
| ``skip`` | what kept the command from starting: ``creates``, ``removes``, ``no_user`` or ``not_root`` |
| ``rc`` | exit status, signal (0: none), milliseconds |
| ``acked`` | the controller has the result; all but ``rc`` is removed |
| ``put`` | path of the hidden file that an upload fills; ``p.N``: piece N of it has arrived |

``/run/agentlab/ID.p`` holds pieces of standard input until the command takes them. The controller has given up an
upload, or such a folder, that got no piece for ``GIVEN_UP`` minutes. The next command or upload removes it with its
hidden file. A restart of the guest empties /run, but not the target's folder. So the next upload into that folder
removes the hidden files there that are older than ``_FORGOTTEN`` minutes.

``/run/agentlab/keep`` holds files of Ansible's modules by their checksums (``kept.py``), at most 16 MiB, for a day
after the last addition.

``mkdir`` of the run's folder succeeds once, so a repeated request starts no second command. A repeat carries the age of
the run. If the guest was started after the first request, /run is empty and nobody can know whether the command ran:
the answer says so.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence

BOOT = 's=$(cat);[ ${#s} = "$1" ]||{ echo agentlab1 cut;exit 0;};eval "$s"'
# Bytes of output inside the answer itself. More output is read from the folder.
INLINE = 65536
# Characters of the longest script, which begins a command, with its values. Of the lists, only that of 40 results that
# the guest may delete is counted in.
_SCRIPT = 11_000
_REQUEST = 65_536
# Minutes without a new piece after which an upload counts as given up. Its pieces follow each other within seconds, and
# while the agent is silent within a minute or two.
GIVEN_UP = 10
# Minutes after which a hidden file of an upload counts as given up, where the guest was started anew since.
_FORGOTTEN = 120
# Bytes of a piece that is sent by itself: a multiple of three, so that its base64 has no padding.
PIECE = 44_100

_BASE = r"""
umask 077
unset CDPATH
say() { echo "agentlab1 $id $*"; }
die() { say "state=refused why=$1"; exit 0; }
base() {
  for b in /run /var/run /tmp; do [ -d $b ] && [ -w $b ] && break; done
  case $b in /tmp) b=/tmp/agentlab-$(id -u);; *) b=$b/agentlab;; esac
  mkdir -m 700 "$b" 2>/dev/null || { [ -d "$b" ] && [ ! -L "$b" ] && [ -O "$b" ]; } || die folder
  d=$b/$id
}
size() { z=0; [ ! -f "$1" ] || z=$(wc -c <"$1"); z=$((z)); }
nap() { sleep 0.1 2>/dev/null || sleep 1; }
"""

# Remove uploads and pieces of standard input that a controller has given up.
_CLEAR = r"""
tidy() {
  find "$b" ! -path "$b" -prune -type d -mmin +$old | while read -r x; do
    case $x in *.p) rm -rf "$x"; continue;; esac
    [ -s "$x/put" ] || continue
    y=$(cat "$x/put"; echo x); y=${y%x}
    case $y in */.agentlab-"${x##*/}") rm -f "$y" "$y.gz";; esac
    rm -rf "$x"
  done
}
"""

_LIBRARY = (
    _BASE
    + r"""
up() { u=; { read -r u _ </proc/uptime; } 2>/dev/null; u=${u%.*}${u#*.}; u=${u#"${u%%[!0]*}"}; u=${u:-0}; }
born() {
  s=; { read -r s <"/proc/$1/stat"; } 2>/dev/null || return 1
  s=${s##*) }; set -- $s; s=${20}; [ "$1" != Z ]
}
alive() { p=; s0=; { read -r p s0 <"$d/sup"; } 2>/dev/null; [ "$p" ] && born $p && [ "$s" = "$s0" ]; }
body() {
  [ $lo -eq 0 ] || { tail -c +$((oo+1)) "$d/out" | head -c $lo; }
  [ $le -eq 0 ] || { tail -c +$((eo+1)) "$d/err" | head -c $le; }
}
frame() {
  st=running; rc=; sg=; ms=; n=0
  while [ ! -s "$d/sup" ] && [ ! -s "$d/rc" ] && [ $n -lt 30 ]; do nap; n=$((n+1)); done
  [ -s "$d/rc" ] || alive || { nap; [ -s "$d/rc" ] || st=lost; }
  [ ! -s "$d/rc" ] || { st=ended; read -r rc sg ms <"$d/rc"; }
  [ ! -e "$d/acked" ] || { say "state=acked rc=$rc sig=$sg ms=$ms"; return; }
  size "$d/out"; so=$z; size "$d/err"; se=$z
  lo=$((so-oo)); [ $lo -ge 0 ] || lo=0
  le=$((se-eo)); [ $le -ge 0 ] || le=0
  g=; sum=0
  if [ $((lo+le)) -gt $lim ]; then
    if [ $st != running ] && [ $part = 0 ]; then
      lo=0; le=0
      for f in out err; do
        [ -e "$d/$f.gz" ] || gzip -1c "$d/$f" >"$d/$f.gz" 2>/dev/null || rm -f "$d/$f.gz"
        size "$d/$f.gz"; g=$g$z,
      done
      sum=$(cat "$d/out" "$d/err" | sha256sum); sum=${sum%% *}
    else
      [ $lo -le $lim ] || lo=$lim
      [ $((lo+le)) -le $lim ] || le=$((lim-lo))
    fi
  fi
  [ $((lo+le)) -eq 0 ] || { sum=$(body | sha256sum); sum=${sum%% *}; }
  t=; for f in out.cut err.cut full late killed; do [ ! -e "$d/$f" ] || t=$t$f,; done
  k=; [ ! -s "$d/skip" ] || read -r k <"$d/skip"
  say "state=$st rc=$rc sig=$sg ms=$ms so=$so se=$se lo=$lo le=$le gz=$g sum=$sum flags=$t skip=$k dir=$d"
  body
}
await() {
  up; e=$((u+w*100)); n=0
  while [ ! -s "$d/sup" ] && [ ! -s "$d/rc" ] && [ $n -lt 30 ]; do nap; n=$((n+1)); done
  while [ ! -s "$d/rc" ] && alive; do up; [ $u -lt $e ] || break; nap; done
}
endgroup() {
  p=; { read -r p <"$d/pid"; } 2>/dev/null; [ "$p" ] || return 0
  kill -TERM -$p 2>/dev/null; up; e=$((u+grace*100))
  while kill -0 -$p 2>/dev/null; do up; [ $u -lt $e ] || break; nap; done
  kill -KILL -$p 2>/dev/null
}
look() { base; [ -d "$d" ] || { say state=none; exit 0; }; await; frame; }
end() {
  base; [ -d "$d" ] || { say state=none; exit 0; }
  await; [ -s "$d/rc" ] || { : >"$d/killed"; endgroup; w=3; await; }
  frame
}
"""
)

_RUN = r"""
rd() {
  # Copy the stream $1 from the pipe to its file, at most $max bytes.
  exec 3<&0; n=0
  while [ $n -lt $max ]; do
    pull $1 65536 $(((max-n+65535)/65536)) $1 || room $1 || { : >"$d/full"; break; }
    size "$d/$1"; [ $z -ne $n ] || return 0; n=$z
  done
  [ -e "$d/full" ] || { pull $1 1 1 $1.x; [ -s "$d/$1.x" ] || return 0; }
  : >"$d/$1.cut"; cat >/dev/null
}
pull() {
  # dd runs beside the shell, so that its process id is known to idle.
  dd bs=$2 count=$3 <&3 2>/dev/null >>"$d/$4" & echo $! >"$d/$1.dd"; wait $!
}
idle() {
  # Whether the reader $2 of the stream $1 has nothing to read: its dd sleeps, which it does at an empty pipe only. A
  # dd that waits for its turn on a busy guest is runnable, and what it has not read yet is not lost.
  [ ! -e "$d/$1.cut" ] || return 0
  born $2 || return 0
  p=; { read -r p <"$d/$1.dd"; } 2>/dev/null; [ "$p" ] || return 1
  s=; { read -r s <"/proc/$p/stat"; } 2>/dev/null || return 1
  s=${s##*) }; set -- $2 $s; [ "$2" = S ] && [ "$3" = $1 ]
}
drain() {
  # Wait for the reader $2 of the stream $1 to end, or to be idle while a child of the command keeps the pipe open.
  while wait $2; [ $? -gt 128 ]; do ! idle $1 $2 || return 0; done
}
timer() {
  s=; trap '[ -z "$s" ] || kill $s 2>/dev/null; exit 0' TERM
  sleep $limit & s=$!; wait $s; s=
  trap '' TERM
  : >"$d/late"; n=0
  while [ ! -s "$d/pid" ] && [ $n -lt 30 ]; do nap; n=$((n+1)); done
  endgroup
}
tick() {
  s=; trap '[ -z "$s" ] || kill $s 2>/dev/null; exit 0' TERM
  while :; do sleep 1 & s=$!; wait $s; kill -USR1 $1 2>/dev/null || exit 0; done
}
forget() {
  : >"$1/acked"
  for f in "$1"/*; do case $f in */rc|*/acked) ;; *) rm -f "$f";; esac; done
}
forgetall() { for a in $acks; do [ ! -d "$b/$a" ] || forget "$b/$a"; done; }
sweep() {
  forgetall
  find "$b" ! -path "$b" -prune -type d -mmin +60 | while read -r x; do [ ! -e "$x/acked" ] || rm -rf "$x"; done
  s=$(du -sk "$b/keep" 2>/dev/null); s=${s%%[!0-9]*}; [ ${s:-0} -le 16384 ] || rm -rf "$b/keep"
  find "$b" ! -path "$b" -prune -type d -mmin +1440 | while read -r x; do d=$x; alive || rm -rf "$x"; done
  tidy
}
supervise() {
  read -r s </proc/self/stat; me=${s%% *}; s=${s##*) }; set -- $s; echo "$me ${20}" >"$d/sup"
  if [ -d /run/systemd/system ]; then
    for c in /sys/fs/cgroup /sys/fs/cgroup/unified /sys/fs/cgroup/systemd; do
      [ -w $c/cgroup.procs ] && { mkdir $c/agentlab; echo $me >$c/agentlab/cgroup.procs; }
    done 2>/dev/null
  fi
  rd out <"$d/o" & r1=$!
  rd err <"$d/e" & r2=$!
  tp=; [ $limit = 0 ] || { timer & tp=$!; }
  up; t0=$u
  # In a shell of its own: dash tells of a signal on the command's standard error otherwise.
  { ( exec setsid sh -c '. "$1/job"' agentlab "$d" <"$d/in" >"$d/o" 2>"$d/e" 3<"$d/do" 4>"$d/skip" ); r=$?; } 2>"$d/sig"
  up; t0=$(((u-t0)*10))
  [ -z "$tp" ] || { [ -e "$d/late" ] || kill $tp 2>/dev/null; wait $tp; }
  trap : USR1
  tick $me & k=$!
  drain out $r1
  drain err $r2
  kill $k 2>/dev/null
  g=0; [ $r -le 128 ] || [ ! -s "$d/sig" ] || g=$((r-128))
  echo "$r $g $t0" 1<>"$d/end"; mv "$d/end" "$d/rc"
  rm -f "$d/job" "$d/do" "$d/in" "$d/o" "$d/e" "$d/sig" "$d"/*.dd "$d"/*.x
  sweep >/dev/null 2>&1 &
}
bad() {
  # What did not arrive as a whole may have found no room. $1: the refusal where there is room.
  room in || fail full
  fail "$1"
}
room() { head -c 65536 /dev/zero >"$d/$1.room" 2>/dev/null; set -- $? "$d/$1.room"; rm -f "$2"; return $1; }
take() {
  # $1: file of the data. Pieces that were sent before, then the input of this request.
  : >"$1"
  if [ "$pieces" ]; then
    n=0
    while [ $n -lt 50 ]; do
      m=; for i in $pieces; do [ -e "$b/$id.p/$i" ] || m=$m,$i; [ ${#m} -lt 1000 ] || break; done
      [ "$m" ] || break
      nap; n=$((n+1))
    done
    [ -z "$m" ] || bad "missing$m"
    for i in $pieces; do cat "$b/$id.p/$i"; done >"$1" || fail full
  fi
  [ $nlast -eq 0 ] || input >>"$1" || bad base64
  size "$1"; [ $z -eq $nraw ] || bad cut
}
assemble() {
  # $d/in holds a recipe, what stands before and after the archive, and files that the guest has not kept yet.
  k=$b/keep; [ -d "$k" ] || rm -f "$k"; mkdir -p "$k" || fail full
  if [ "$fresh" ]; then
    mkdir "$d/k"; o=$((nrec+nhead+ntail))
    for x in $fresh; do part $o ${x#*:} >"$d/k/${x%%:*}" || fail full; o=$((o+${x#*:})); done
    # A sweep of another command may have removed the folder meanwhile.
    mv -f "$d"/k/* "$k/" && rmdir "$d/k" || fail unkept
  fi
  for x in $need; do [ -e "$k/$x" ] || fail unkept; done
  part 0 $nrec >"$d/recipe" || fail full
  { part $nrec $nhead; . "$d/recipe" | base64 | tr -d '\n'; part $((nrec+nhead)) $ntail; } >"$d/in2" || fail full
  mv "$d/in2" "$d/in"; rm -f "$d/recipe"
}
part() { tail -c +$(($1+1)) "$d/in" | head -c $2; }
theirs() {
  # Answer for the run that another request of this id has begun. Fail if that request is refused: then it began nothing
  # and removes the folder, which it never does once there is a supervisor.
  n=0
  while [ ! -s "$d/sup" ] && [ ! -s "$d/rc" ] && [ $n -lt 60 ]; do [ -d "$d" ] || return 1; nap; n=$((n+1)); done
  await; frame; return 0
}
begin() {
  base
  [ ! -d "$d" ] || ! theirs || return 0
  if [ $age -ge 0 ]; then up; [ $u -gt $((age*100)) ] || { say state=gone; return; }; fi
  for c in base64 setsid mkfifo dd wc sha256sum tail head; do command -v $c >/dev/null 2>&1 || die "no_$c"; done
  if ! mkdir -m 700 "$d" 2>/dev/null; then [ -d "$d" ] || die folder; theirs || die cut; return; fi
  fail() {
    rm -rf "$d"
    # Make room for the repeat.
    [ $1 != full ] || { rm -rf "$b/$id.p" "$b/keep"; forgetall; }
    die $1
  }
  # The end of the command is written over this, so that it is told also where /run is full by then.
  echo the-end-of-the-command-stands-here >"$d/end" || fail full
  work >"$d/do" || bad base64
  size "$d/do"; [ $z -eq $nwork ] || bad cut
  take "$d/in"
  if [ $gz = 1 ]; then gzip -dc <"$d/in" >"$d/in2" || bad gzip; mv "$d/in2" "$d/in"; fi
  [ ${nrec:-0} -eq 0 ] || assemble
  if [ "$insum" ]; then s=$(sha256sum <"$d/in"); [ "${s%% *}" = $insum ] || fail sum; fi
  [ -z "$pieces" ] || rm -rf "$b/$id.p"
  : >"$d/out"; : >"$d/err"
  mkfifo -m 666 "$d/o" "$d/e" || fail full
  { echo "d='$d'"; echo "user='$user'"; job; } >"$d/job" || fail full
  ( supervise ) </dev/null >/dev/null 2>&1 & sp=$!
  ( s=; trap '[ -z "$s" ] || kill $s 2>/dev/null; exit 0' TERM
    sleep $w & s=$!; wait $s; s=; kill -USR1 $$ ) </dev/null >/dev/null 2>&1 & wp=$!
  q=; trap 'q=1' USR1
  [ "$q" ] || wait $sp
  kill $wp 2>/dev/null
  frame
}
job() { cat <<'agentlab_job'
echo $$ >"$d/pid"
umask 022
unset CDPATH
say() { echo "$1" >&4; shift; echo "agentlab: $*" >&2; exit 125; }
find_user() {
  n=; while IFS=: read -r n _ i g _ h c; do [ "$n" = "$1" ] && return; [ "$i" = "$1" ] && return; done </etc/passwd
  IFS=: read -r n _ i g _ h c <<E
$(getent passwd "$1" 2>/dev/null)
E
  [ "$n" ]
}
: ${PATH:=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}
export PATH
if [ "$user" ]; then
  find_user "$user" || say no_user "no user $user in this guest"
  me=$(id -u)
  export HOME="$h" USER="$n" LOGNAME="$n" SHELL="${c:-/bin/sh}"
  if [ "$me" != "$i" ]; then
    [ "$me" = 0 ] || say not_root "the guest agent does not run as root, so it cannot become $user"
    if setpriv --reuid="$i" --regid="$g" --init-groups true 2>/dev/null; then
      exec setpriv --reuid="$i" --regid="$g" --init-groups sh -c 'eval "$(cat <&3)"'
    fi
    exec su -s /bin/sh -c 'eval "$(cat <&3)"' "$n"
  fi
elif [ "${HOME:-/}" = / ]; then
  if find_user "$(id -u)"; then export HOME="$h" USER="$n" LOGNAME="$n" SHELL="${c:-/bin/sh}"; else export HOME=/; fi
fi
eval "$(cat <&3)"
agentlab_job
}
"""

_PLACE = r"""
place() {
  P=$(name; echo x); P=${P%x}
  case $P in /*) ;; *) die relative;; esac
  if [ -L "$P" ]; then P=$(readlink -f "$P"; echo x); P=${P%x}; P=${P%?}; fi
  [ ! -d "$P" ] || die isdir
  case $P in */) die isdir;; esac
  T=${P%/*}; [ -d "${T:-/}" ] || die nofolder
  T=$T/.agentlab-$id
}
"""

_PIECE = r"""
piece() {
  base; place; mkdir -m 700 "$d" 2>/dev/null; printf %s "$T" >"$d/put"
  input | dd of="$T$gzs" bs=$bs seek=$i conv=notrunc 2>/dev/null && : >"$d/p.$i"
}
"""

_FINISH = r"""
fail() { rm -f "$T" "$T.gz"; rm -rf "$d"; die $1; }
forgotten() {
  for y in "${T%/*}"/.agentlab-*; do
    x=${y##*/.agentlab-}; x=${x%.gz}
    case $x in *[!0-9a-f]*) continue;; esac
    [ ${#x} -ne 32 ] || [ ! -f "$y" ] || find "$y" -mmin +$older -exec rm -f {} \;
  done
}
finish() {
  base; place; mkdir -m 700 "$d" 2>/dev/null; printf %s "$T" >"$d/put"
  ( : >>"$T$gzs" ) 2>/dev/null || fail nowrite
  n=0
  while [ $n -lt 50 ]; do
    m=; i=0
    while [ $i -lt $last ] && [ ${#m} -lt 1000 ]; do [ -e "$d/p.$i" ] || m=$m,$i; i=$((i+1)); done
    [ "$m" ] || break
    nap; n=$((n+1))
  done
  if [ "$m" ]; then
    head -c 65536 /dev/zero >"$T.t" 2>/dev/null || { rm -f "$T.t"; fail full; }
    rm -f "$T.t"
    die "missing$m"
  fi
  if [ $nlast -gt 0 ]; then input | dd of="$T$gzs" bs=$bs seek=$last conv=notrunc 2>/dev/null || fail full; fi
  size "$T$gzs"; [ $z -eq $nraw ] || fail cut
  [ -z "$gzs" ] || { gzip -dc <"$T.gz" >"$T" || fail full; rm -f "$T.gz"; }
  s=$(sha256sum <"$T"); [ "${s%% *}" = $insum ] || fail sum
  o=$owner; r=$mode
  if [ -e "$P" ]; then
    s=$(stat -c '%a %u:%g' "$P") || fail stat
    r=${r:-${s%% *}}; o=${o:-${s##* }}
  fi
  [ -z "$o" ] || [ "$o" = "$(stat -c %u:%g "$T")" ] || chown "$o" "$T" 2>/dev/null || fail owner
  chmod ${r:-644} "$T" || fail mode
  mv -f "$T" "$P" || fail full
  size "$P"; s=$(stat -c %a "$P")
  rm -rf "$d"
  say "state=put so=$z mode=$s sum=$insum"
  { tidy; forgotten; } </dev/null >/dev/null 2>&1 &
}
"""

_GET = r"""
get() {
  base; P=$(name; echo x); P=${P%x}
  case $P in /*) ;; *) die relative;; esac
  [ ! -d "$P" ] || die isdir
  [ -e "$P" ] || die missing
  [ -f "$P" ] || die special
  [ -r "$P" ] || die noread
  mkdir -m 700 "$d" 2>/dev/null; : >"$d/put"
  size "$P"; so=$z; mode=$(stat -L -c %a "$P"); lo=0; g=
  if [ $so -le $lim ]; then
    # The answer is made of a copy, so that length, checksum and bytes belong together.
    head -c $lim "$P" >"$d/f"; size "$d/f"; so=$z; lo=$z; sum=$(sha256sum <"$d/f"); sum=${sum%% *}
  else
    ln -s "$P" "$d/f"
    sum=$(sha256sum <"$P"); sum=${sum%% *}
    z=$(head -c 262144 "$P" | gzip -1c 2>/dev/null | wc -c)
    if [ $((z)) -gt 0 ] && [ $((z)) -lt 210000 ] && [ $so -lt 134217728 ]; then
      if gzip -1c <"$P" >"$d/f.gz" 2>/dev/null; then size "$d/f.gz"; g=$z; else rm -f "$d/f.gz"; fi
    fi
  fi
  say "state=get so=$so lo=$lo mode=$mode sum=$sum gz=$g dir=$d"
  if [ -L "$d/f" ]; then return; fi
  cat "$d/f"; rm -rf "$d"
}
"""

_DROP = r"""
drop() { base; place; rm -f "$T" "$T.gz"; rm -rf "$d"; }
"""

_READ = r"""
chunk() {
  base; [ -e "$d/$file" ] || { say state=none; exit 0; }
  say "state=chunk"; tail -c +$((oo+1)) "$d/$file" | head -c $lim
}
"""

_STAGE = r"""
stage() {
  base; mkdir -p "$b/$id.p" || die full
  input >"$b/$id.p/$i.t" || die base64
  size "$b/$id.p/$i.t"; [ $z -eq $nraw ] || die cut
  mv "$b/$id.p/$i.t" "$b/$id.p/$i"; say state=ok
}
"""

_PARTS = {
    "begin": _LIBRARY + _CLEAR + _RUN,
    "look": _LIBRARY,
    "end": _LIBRARY,
    "stage": _BASE + _STAGE,
    "piece": _BASE + _PLACE + _PIECE,
    "finish": _BASE + _PLACE + _CLEAR + _FINISH,
    "get": _BASE + _GET,
    "drop": _BASE + _PLACE + _DROP,
    "chunk": _BASE + _READ,
}
# Comments and indentation are for readers only. A command's text is data, and is not touched.
_PARTS = {
    name: "\n".join(line.lstrip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("# "))
    for name, text in _PARTS.items()
}
_WORD = re.compile(r"[A-Za-z0-9_.,: -]*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WILDCARD = re.compile(rb"([*?\[\]])")


def compose_request(operation: str, values: Mapping[str, object], blobs: Mapping[str, bytes] | None = None) -> str:
    """Return the script of one request: an operation of the wrapper with its values and data.

    ``values`` become shell variables and must be plain ASCII (numbers, ids, words); otherwise ValueError is raised.
    ``blobs`` become functions of that name which write the bytes.
    """
    lines = [_PARTS[operation]]
    for name, value in {"old": GIVEN_UP, "older": _FORGOTTEN, **values}.items():
        if not _WORD.fullmatch(str(value)):
            raise ValueError(f"{name}: {value!r} is no word")
        lines.append(f"{name}='{value}'")
    for name, data in (blobs or {}).items():
        text = base64.b64encode(data).decode()
        lines.append(f"{name}() {{ base64 -d <<'agentlab_end'\n{text}\nagentlab_end\n}}")
    return "\n".join([*lines, operation])


def compute_room(lists: int) -> int:
    """Return how many bytes fit into the request that begins a command, beside its script and lists of that length."""
    return (_REQUEST - _SCRIPT - lists) * 3 // 4 - 16


def quote(value: bytes) -> bytes:
    """Return a value as one word of shell text. Any bytes but NUL are possible."""
    return b"'" + value.replace(b"'", b"'\\''") + b"'"


def compose_shell_text(
    argv: Sequence[bytes],
    *,
    chdir: bytes | None = None,
    environment: Mapping[bytes, bytes] | None = None,
    creates: bytes | None = None,
    removes: bytes | None = None,
) -> bytes:
    """Return the command as shell text.

    The text changes to the folder, checks creates and removes, sets the environment, and calls exec.
    """
    lines = [b"exec 3<&-"]
    if chdir is None:
        lines.append(b'cd "${HOME:-/}" 2>/dev/null || cd /')
    else:
        lines.append(b"cd -- " + quote(chdir) + b" || exit 125")
    exists = b'[ -e "$f" ] || [ -L "$f" ]'
    if creates is not None:
        lines.append(
            b"for f in %s; do if %s; then echo creates >&4; exit 0; fi; done" % (_quote_pattern(creates), exists)
        )
    if removes is not None:
        lines.append(b"k=1; for f in %s; do if %s; then k=; fi; done" % (_quote_pattern(removes), exists))
        lines.append(b'if [ "$k" ]; then echo removes >&4; exit 0; fi')
    lines.append(b"unset f k; exec 4>&-")
    for name, value in (environment or {}).items():
        if not _NAME.fullmatch(name.decode("ascii", "replace")):
            raise ValueError("environment")
        lines.append(b"export " + name + b"=" + quote(value))
    lines.append(b"set -- " + b" ".join(quote(word) for word in argv))
    if b"/" not in argv[0] and not argv[0].startswith(b"-"):
        # After exec of a missing program dash and busybox exit with 126 if PATH has a folder that the user may not
        # search. Without exec they exit with 127, as every shell does.
        lines.append(b'command -v "$1" >/dev/null 2>&1 || { "$@"; exit $?; }')
    lines.append(b'exec "$@"')
    return b"\n".join(lines) + b"\n"


def _quote_pattern(value: bytes) -> bytes:
    """Return a pattern of ``creates`` or ``removes`` as shell text. Only * ? and [...] are wildcards."""
    parts = [part for part in _WILDCARD.split(value) if part]
    return b"".join(part if _WILDCARD.fullmatch(part) else quote(part) for part in parts)
