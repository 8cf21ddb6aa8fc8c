#!/bin/sh
# Turns a clone of mediaserver into a service behind nginx, on Debian 12 or later and Raspberry Pi OS.
# Running it again upgrades: the program, units and site are replaced; secrets, settings and data stay.
set -eu

usage() {
    cat <<'END'
usage: sudo ./setup.sh [options]
  --domain NAME        the site's name (default: as before, else HOSTNAME.local)
  --port N             the server's port on 127.0.0.1 (as before, else 8000)
  --storage-dir DIR    the folder of pictures (as before, else /var/lib/mediaserver/pictures)
  --upload-limit SIZE  the largest file, such as 500M or 2G (as before, else 10M; accounts, entities 1G)
  --accel-redirect     let nginx read the pictures and send them (ACCEL_REDIRECT)
  --install            install nginx, Pillow and acl with apt-get where they are missing
  --dry-run            print every step, do none
  --uninstall          remove the service, program and site; keep data and secrets
  --purge              with --uninstall: remove these too
DESTDIR=FOLDER writes below FOLDER and makes no user; SYSTEMCTL and NGINX name other commands to call.
END
}

say() { printf '%s\n' "setup: $*"; }
warn() { printf '%s\n' "setup: $*" >&2; }
die() {
    warn "$*"
    exit 1
}
misused() {
    warn "$*"
    usage >&2
    exit 2
}

# --- options ---

domain='' port='' storage='' limit='' accel='' install='' dry='' uninstall='' purge=''
while [ $# -gt 0 ]; do
    case $1 in
    --domain | --port | --storage-dir | --upload-limit)
        [ $# -ge 2 ] || misused "$1 needs a value"
        case $1 in
        --domain) domain=$2 ;;
        --port) port=$2 ;;
        --storage-dir) storage=$2 ;;
        --upload-limit) limit=$2 ;;
        esac
        shift
        ;;
    --accel-redirect) accel=true ;;
    --install) install=yes ;;
    --dry-run) dry=yes ;;
    --uninstall) uninstall=yes ;;
    --purge) purge=yes ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) misused "unknown option $1" ;;
    esac
    shift
done

check_domain() {
    case $1 in
    '' | *[!A-Za-z0-9.-]* | -* | .*) misused "--domain: '$1' is no host name" ;;
    esac
}
check_port() {
    case $1 in
    '' | *[!0-9]* | ??????*) misused "--port: '$1' is no port" ;;
    esac
    if [ "$1" -lt 1 ] || [ "$1" -gt 65535 ]; then misused "--port: '$1' is no port"; fi
}
check_folder() { # what has a meaning in nginx.conf, in a unit or in sed
    case $1 in
    / | /*[\"\\\$\;\{\}%\#\|\&\'\`:]* | *'
'*) misused "$2: '$1' cannot be used: it must not have \" ' \\ \$ ; { } % # | & \` : in it" ;;
    /*) ;;
    *) misused "$2: '$1' is not an absolute path" ;;
    esac
}
parse_size() { # bytes of 500M or 2G
    digits=${1%[KkMmGg]}
    case $digits in
    '' | *[!0-9]* | ?????????????*) misused "--upload-limit: '$1' is no size such as 500M or 2G" ;;
    esac
    case $1 in
    *[Kk]) echo $((digits * 1024)) ;;
    *[Mm]) echo $((digits * 1048576)) ;;
    *[Gg]) echo $((digits * 1073741824)) ;;
    *) echo "$digits" ;;
    esac
}

[ -z "$domain" ] || check_domain "$domain"
[ -z "$port" ] || check_port "$port"
if [ -n "$storage" ]; then
    case $storage in /*) ;; *) storage=$PWD/$storage ;; esac
    [ "$storage" = / ] || storage=${storage%/}
    check_folder "$storage" --storage-dir
fi
if [ -n "$limit" ]; then
    limit=$(parse_size "$limit") || exit 2
    [ "$limit" -gt 0 ] || misused "--upload-limit: must be more than 0"
fi
[ -z "$purge" ] || [ -n "$uninstall" ] || misused "--purge goes with --uninstall"

# --- where everything is ---

source=$(cd "$(dirname "$0")" && pwd)
root=${DESTDIR:-}
root=${root%/}
program=$root/opt/mediaserver
config=$root/etc/mediaserver
settings=$config/mediaserver.env
state=/var/lib/mediaserver
units=$root/etc/systemd/system
site=$root/etc/nginx/sites-available/mediaserver
enabled=$root/etc/nginx/sites-enabled/mediaserver
acme=$root/var/www/mediaserver
launcher=$root/usr/local/bin/media-server
systemctl=${SYSTEMCTL:-systemctl}
nginx=${NGINX:-nginx}
PATH=$PATH:/usr/sbin:/sbin

# --- how a step is done ---

run() { # a command; with --dry-run only its words
    if [ -n "$dry" ]; then
        printf '    %s\n' "$*"
    else
        "$@"
    fi
}
live() { [ -z "$root" ]; } # whether this is about the machine itself
have() { command -v "$1" >/dev/null 2>&1; }
service() { # systemctl, unless files are only put below DESTDIR
    if live || [ -n "${SYSTEMCTL:-}" ]; then run "$systemctl" "$@"; fi
}
own() { # own MODE OWNER PATH...
    mode=$1 owner=$2
    shift 2
    if live; then run chown -h "$owner" "$@"; fi
    run chmod "$mode" "$@"
}
folder() { # folder MODE OWNER PATH: made if it is not there; what is there stays as it is
    [ ! -d "$3" ] || return 0
    run mkdir -p "$3"
    own "$1" "$2" "$3"
}
write() { # write MODE OWNER PATH: standard input becomes the file, whole or not at all
    if [ -n "$dry" ]; then
        cat >/dev/null
        printf '    write %s (%s %s)\n' "$3" "$1" "$2"
        return
    fi
    (umask 077 && cat >"$3.new")
    own "$1" "$2" "$3.new"
    mv -f "$3.new" "$3"
}

# --- settings ---

get() { # the value of a setting in mediaserver.env, or nothing
    [ -r "$settings" ] || return 0
    sed -n "s/^$1=//p" "$settings" | tail -n 1 | sed 's/^"\(.*\)"$/\1/; s/\\\(["\\]\)/\1/g'
}
put() { # put NAME VALUE: the setting now has this value; all other lines stay
    case $2 in
    *[!A-Za-z0-9_./:,@+=*-]*) line="$1=\"$(printf '%s' "$2" | sed 's/[\\"]/\\&/g')\"" ;;
    *) line="$1=$2" ;;
    esac
    if [ -n "$dry" ]; then
        printf '    set %s in %s\n' "$1" "$settings"
        return
    fi
    { sed "/^$1=/d" "$settings" && printf '%s\n' "$line"; } | write 0640 root:mediaserver "$settings"
}
keep() { # keep NAME VALUE: give a setting a value if it has none
    [ -n "$(get "$1")" ] || put "$1" "$2"
}
found() { # found FILE: NAME VALUE of each setting in a .env, as the program itself reads it
    [ -f "$1" ] || return 0
    python3 -B - "$source" "$1" <<'END'
import os, sys
source, path = sys.argv[1:]
sys.path.insert(0, source)
import mediaserver
from pathlib import Path
known = {name.upper(): how for name, _, how in mediaserver.Settings.table()}
for name, value in mediaserver.read_dotenv(Path(path), {}).items():
    if name in known and value and "\n" not in value:
        if known[name].parse is mediaserver.parse_path:
            value = os.path.join(os.path.dirname(path), os.path.expanduser(value))
        print(name, value)
END
}
adopt() { # adopt FILE: its settings, where they have no value yet
    lines=$(found "$1") || die "$1 cannot be read; it may hold secrets, so nothing was changed"
    [ -n "$lines" ] || return 0
    while read -r name value; do keep "$name" "$value"; done <<END
$lines
END
}

new_secret() { # 32 random bytes in base64url
    head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'
}

# --- the steps ---

check_machine() {
    say "checking this machine"
    if live && [ -z "$dry" ] && [ "$(id -u)" -ne 0 ]; then die "run it as root: sudo ./setup.sh"; fi
    have python3 || die "Python is missing: apt-get install python3"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "Python 3.10 or later is needed; this is $(python3 --version)"
    python3 -B "$source/mediaserver.py" --version >/dev/null || die "mediaserver.py does not start here"
    live || return 0
    missing=''
    have "$nginx" || missing="$missing nginx"
    python3 -c 'import PIL' 2>/dev/null || missing="$missing python3-pil"
    have setfacl || missing="$missing acl"
    have openssl || missing="$missing openssl"
    if [ -n "$missing" ] && [ -n "$install" ]; then
        say "installing$missing"
        # shellcheck disable=SC2086 # several packages
        run env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing
    fi
    [ -n "$dry" ] && return 0
    [ -d /run/systemd/system ] || [ -n "${SYSTEMCTL:-}" ] || die "systemd does not run this machine"
    have "$nginx" || die "nginx is missing: run setup.sh with --install, or apt-get install nginx"
    python3 -c 'import PIL' 2>/dev/null || warn "without python3-pil there are no thumbnails (--install)"
}

make_user() {
    say "the user that the service runs as: mediaserver"
    if ! live || id mediaserver >/dev/null 2>&1; then return 0; fi
    getent group mediaserver >/dev/null || run groupadd --system mediaserver
    run useradd --system --gid mediaserver --home-dir $state --no-create-home --shell /usr/sbin/nologin mediaserver
}

install_program() {
    say "the program: $program/mediaserver.py, and the command media-server"
    folder 0755 root:root "$program"
    write 0755 root:root "$program/mediaserver.py" <"$source/mediaserver.py"
    folder 0755 root:root "$(dirname "$launcher")"
    write 0755 root:root "$launcher" <<'END'
#!/bin/sh
# media-server --storage_dir DIR …  runs the program; as root and without a folder, its commands (token,
# user, verify …) run on the installed service's folder, with its settings and as its user.
program=/opt/mediaserver/mediaserver.py
case "$*" in *--storage[_-]dir*) exec python3 $program "$@" ;; esac
if [ -z "$STORAGE_DIR" ] && [ "$(id -u)" -eq 0 ] && [ -r /etc/mediaserver/mediaserver.env ]; then
    while IFS='=' read -r name value; do
        case $name in '' | *[!A-Z0-9_]*) continue ;; esac
        value=$(printf '%s' "$value" | sed 's/^"\(.*\)"$/\1/; s/\\\(["\\]\)/\1/g')
        export "$name=$value"
    done </etc/mediaserver/mediaserver.env
    umask 077
    cd /var/lib/mediaserver || exit
    exec setpriv --reuid mediaserver --regid mediaserver --init-groups -- python3 $program "$@"
fi
exec python3 $program "$@"
END
}

configure() {
    say "settings: $settings (what is there is kept)"
    folder 0750 root:mediaserver "$config"
    if [ ! -f "$settings" ]; then
        write 0640 root:mediaserver "$settings" <<'END'
# mediaserver's settings, all of README.md's table; setup.sh changes only what its options name.
# After a change: sudo systemctl restart mediaserver (sizes, port and folders: run setup.sh again)
END
    fi
    adopt "$source/.env"
    [ -z "$storage" ] || put STORAGE_DIR "$storage"
    keep STORAGE_DIR "${storage:-$state/pictures}"
    pictures=$(get STORAGE_DIR)
    pictures=${pictures:-${storage:-$state/pictures}}
    # The layout of a server that was started by hand: DATA lies in the folder, and stays there
    if [ -e "$root$pictures/.mediaserver/secrets.env" ] || [ -e "$root$pictures/.mediaserver/index.sqlite3" ]; then
        keep DATABASE_DIR "$pictures/.mediaserver"
    fi
    keep DATABASE_DIR "$state/data"
    data=$(get DATABASE_DIR)
    data=${data:-$state/data}
    check_folder "$pictures" STORAGE_DIR
    check_folder "$data" DATABASE_DIR
    adopt "$root$data/secrets.env"
    for name in MEDIA_SERVER_SECRET AUTH_TOKEN JWT_SIGNING_KEY; do
        [ -n "$(get $name)" ] || put $name "$(new_secret)"
    done
    [ -z "$domain" ] || put DOMAIN "$domain"
    keep DOMAIN "$(uname -n | cut -d. -f1).local"
    domain=$(get DOMAIN)
    domain=${domain:-mediaserver.local}
    check_domain "$domain"
    old_port=$(get PORT)
    [ -z "$port" ] || put PORT "$port"
    keep PORT 8000
    port=${port:-${old_port:-8000}}
    check_port "$port"
    if [ -n "$limit" ]; then
        put MAX_UPLOAD_BYTES "$limit"
        put MAX_MEDIA_BYTES "$limit"
    fi
    [ -z "$accel" ] || put ACCEL_REDIRECT true
    accel=$(get ACCEL_REDIRECT)
}

make_folders() {
    say "data: $data; pictures: $pictures"
    folder 0700 mediaserver:mediaserver "$root$state"
    folder 0700 mediaserver:mediaserver "$root$data"
    folder 0750 mediaserver:mediaserver "$root$pictures"
    live || return 0
    case $data in
    $state/*) ;;
    *) run chown -R mediaserver:mediaserver "$data" ;;
    esac
    case $pictures in $state/*) return 0 ;; esac
    owner=$(stat -c %U "$pictures" 2>/dev/null || echo mediaserver)
    [ "$owner" != mediaserver ] || return 0
    say "$pictures is $owner's: the service may read and write there, $owner keeps what it may"
    for hidden in "$pictures/.incoming" "$pictures/.thumbnails"; do # of a server started by hand
        [ ! -d "$hidden" ] || run chown -R mediaserver:mediaserver "$hidden"
    done
    grant=u:mediaserver:rwX,u:"$owner":rwX
    run setfacl -R -m "$grant,d:u:mediaserver:rwX,d:u:$owner:rwX" "$pictures" || cannot_grant
    parent=$(dirname "$pictures")
    while [ "$parent" != / ]; do # such as a home folder with mode 0700
        as_service test -x "$parent" || run setfacl -m u:mediaserver:x "$parent" || cannot_grant
        parent=$(dirname "$parent")
    done
}

as_service() { setpriv --reuid mediaserver --regid mediaserver --init-groups -- "$@" 2>/dev/null; }
cannot_grant() {
    warn "the service may not write to $pictures: no setfacl (run again with --install), or a file"
    warn "system without access lists (mount it with uid=mediaserver); until then it only reads, if that"
}

write_units() {
    say "systemd: mediaserver.service and mediaserver.socket (a restart loses no connection)"
    folder 0755 root:root "$units/mediaserver.service.d"
    write 0644 root:root "$units/mediaserver.service" <"$source/mediaserver.service"
    write 0644 root:root "$units/mediaserver.socket" <<END
# Written by setup.sh
[Unit]
Description=The port of mediaserver

[Socket]
ListenStream=127.0.0.1:$port
Backlog=1024
NoDelay=yes

[Install]
WantedBy=sockets.target
END
    write 0644 root:root "$units/mediaserver.service.d/setup.conf" <<END
# Written by setup.sh: what the folders in mediaserver.env need
[Unit]
RequiresMountsFor="$data"
[Service]
$(for path in "$pictures" "$data"; do
        case $path in
        $state/*) ;;
        /home/* | /root/* | /run/user/*) echo "BindPaths=\"-$path\"" ;;
        *) echo "ReadWritePaths=\"-$path\"" ;;
        esac
    done)
$([ "$accel" != true ] || echo "StateDirectoryMode=0710
UMask=0027")
END
}

let_nginx_read() {
    [ "$accel" = true ] || return 0
    say "nginx may read the pictures: www-data joins the group mediaserver; $data stays closed to it"
    run chmod 0710 "$root$state"
    case $pictures in $state/*) run chmod -R g+rX "$root$pictures" ;; esac
    if live; then run usermod -aG mediaserver www-data; fi
}

find_certificate() { # sets `certificate` to the folder with fullchain.pem and privkey.pem
    certificate=/etc/letsencrypt/live/$domain
    [ ! -e "$root$certificate/fullchain.pem" ] || return 0
    certificate=/etc/mediaserver/tls
    say "no certificate in /etc/letsencrypt/live/$domain yet: a self-signed one serves until then"
    name=$(cat "$config/tls/domain" 2>/dev/null || true)
    [ "$name" != "$domain" ] || return 0
    folder 0700 root:root "$config/tls"
    run openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
        -subj "/CN=$domain" -addext "subjectAltName=DNS:$domain" \
        -keyout "$config/tls/privkey.pem" -out "$config/tls/fullchain.pem" 2>/dev/null
    printf '%s\n' "$domain" | write 0600 root:root "$config/tls/domain"
}

body_limit() { # the larger of the two limits in MiB, and 2 for the form around the file
    small=$(get MAX_UPLOAD_BYTES)
    large=$(get MAX_MEDIA_BYTES)
    small=${small:-10485760} large=${large:-1073741824}
    [ "$small" -le "$large" ] || large=$small
    echo $((large / 1048576 + 2 + (large % 1048576 > 0)))m
}

new_http2() { # whether nginx has `http2 on` (1.25.1) and warns of `listen … http2`
    version=$("$nginx" -v 2>&1 | sed -n 's#.*nginx/\([0-9.]*\).*#\1#p')
    [ "$(printf '%s\n' "$version" 1.25.1 | sort -V | head -n 1)" = 1.25.1 ]
}

render_site() {
    images=$(get UPLOAD_DIR)
    entities=$(get MEDIA_STORAGE_DIR)
    if new_http2; then
        http2='s/^\( *\)listen 443 ssl http2;/\1http2 on;\n\1listen 443 ssl;/; s/ ssl http2;/ ssl;/'
    else
        http2=''
    fi
    ipv6=''
    [ -e /proc/net/if_inet6 ] || ipv6='/listen \[::\]/d' # nginx would not start without it
    sed -e "s|/etc/letsencrypt/live/photos\.example\.org|$certificate|" \
        -e "s|photos\.example\.org|$domain|g" \
        -e "s|127\.0\.0\.1:8000|127.0.0.1:$port|" \
        -e "s|client_max_body_size [0-9]*m|client_max_body_size $(body_limit)|" \
        -e "s|/var/lib/mediaserver/pictures/|\"$pictures/\"|" \
        -e "s|/var/lib/mediaserver/data/images/|\"${images:-$data/images}/\"|" \
        -e "s|/var/lib/mediaserver/data/entities/|\"${entities:-$data/entities}/\"|" \
        -e "s|/var/lib/mediaserver/data/users/|\"$data/users/\"|" \
        -e "$ipv6" -e 's|from="\(.*\)/";|"from=\1/";|' -e "$http2" "$source/nginx.conf"
}

install_site() {
    say "nginx: the site $domain"
    folder 0755 root:root "$acme"
    folder 0755 root:root "$(dirname "$site")"
    folder 0755 root:root "$(dirname "$enabled")"
    find_certificate
    mark=$config/site.sha256
    if [ -f "$site" ] && ! sha256sum --status -c "$mark" 2>/dev/null; then
        render_site | write 0644 root:root "$config/site.new"
        warn "$site was changed by hand and stays; compare it with $config/site.new"
        return 0
    fi
    if [ -z "$dry" ] && [ -f "$site" ]; then cp -p "$site" "$site.before"; fi
    render_site | write 0644 root:root "$site"
    run ln -sfn "/etc/nginx/sites-available/mediaserver" "$enabled"
    [ -z "$dry" ] || return 0
    if live || [ -n "${NGINX:-}" ]; then
        if ! "$nginx" -q -t; then
            roll_back_site
            die "nginx does not take the site (see above): the one before is back, nothing was reloaded"
        fi
    fi
    rm -f "$site.before"
    sha256sum "$site" | write 0644 root:root "$mark"
    service reload-or-restart nginx
}

roll_back_site() {
    if [ -f "$site.before" ]; then
        mv -f "$site.before" "$site"
    else
        rm -f "$site" "$enabled"
    fi
}

start() {
    say "starting the service, and with every start of this machine"
    service daemon-reload
    service enable mediaserver.socket mediaserver.service
    service reset-failed mediaserver.socket mediaserver.service 2>/dev/null || true
    if [ "$old_port" != "$port" ]; then
        service stop mediaserver.service mediaserver.socket
        service start mediaserver.socket
    else
        service start mediaserver.socket
    fi
    service restart mediaserver.service || failed
    if ! live || [ -n "$dry" ]; then return 0; fi
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        healthy && return 0
        sleep 1
    done
    failed
}

healthy() {
    python3 - "$port" <<'END' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=5)
END
}

failed() {
    die "the service does not answer; its log says why: journalctl -u mediaserver -e --no-pager"
}

remove() {
    say "stopping the service"
    service disable --now mediaserver.service mediaserver.socket || true
    say "removing units, site and program"
    run rm -f "$units/mediaserver.service" "$units/mediaserver.socket" "$units/mediaserver.service.d/setup.conf"
    [ ! -d "$units/mediaserver.service.d" ] || run rmdir --ignore-fail-on-non-empty "$units/mediaserver.service.d"
    service daemon-reload || true
    if [ -e "$site" ] || [ -L "$enabled" ]; then
        run rm -f "$site" "$enabled" "$config/site.sha256"
        service reload-or-restart nginx || warn "nginx could not be reloaded"
    fi
    run rm -rf "$program"
    run rm -f "$launcher"
    if [ -z "$purge" ]; then
        say "kept: $config and $root$state (--purge removes them)"
        return 0
    fi
    pictures=$(get STORAGE_DIR)
    say "removing settings, secrets and data: $config $root$state"
    run rm -rf "$config" "$root$state" "$acme"
    case $pictures in '' | $state/*) ;; *) say "$pictures is yours, and stays with all that lies in it" ;; esac
    live && id mediaserver >/dev/null 2>&1 || return 0
    run userdel mediaserver 2>/dev/null # and the group, unless nginx's user is in it
    if getent group mediaserver >/dev/null; then run groupdel mediaserver; fi
}

if [ -n "$uninstall" ]; then
    if live && [ -z "$dry" ] && [ "$(id -u)" -ne 0 ]; then die "run it as root: sudo ./setup.sh --uninstall"; fi
    remove
    say "done"
    exit 0
fi
check_machine
make_user
install_program
configure
make_folders
write_units
let_nginx_read
start
install_site
[ -z "$dry" ] || {
    say "that is all; nothing was done"
    exit 0
}
say "done: https://$domain/ (the owner's key: sudo grep AUTH_TOKEN $settings)"
