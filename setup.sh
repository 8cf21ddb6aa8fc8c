#!/bin/sh
# Turns a clone of mediaserver into a service behind nginx, on Debian 12 or later and Raspberry Pi OS.
# Running it again upgrades: the program, units and site are replaced; secrets, settings and data stay.
# It runs as root among folders that others own. So: no word of theirs becomes part of a program, none
# of their links is followed, and what can be done as their owner is done as their owner.
set -eu
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
unset CDPATH TMPDIR
umask 022

usage() {
    cat <<'END'
usage: sudo ./setup.sh [options]
  --domain NAME        the site's name (default: as before, else HOSTNAME.local)
  --port N             the server's port on 127.0.0.1 (as before, else 8000)
  --storage-dir DIR    the folder of pictures (as before, else /var/lib/mediaserver/pictures)
  --upload-limit SIZE  the largest file, such as 500M or 2G (as before, else 10M; accounts, entities 1G)
  --open-registration  anyone may make an account (else, on a new installation, nobody may)
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

domain='' port='' storage='' limit='' accel='' open='' install='' dry='' uninstall='' purge=''
while [ $# -gt 0 ]; do
    case $1 in
    --domain=* | --port=* | --storage-dir=* | --upload-limit=*)
        option=$1
        shift
        set -- "${option%%=*}" "${option#*=}" "$@"
        ;;
    esac
    case $1 in
    --domain | --port | --storage-dir | --upload-limit)
        [ -n "${2:-}" ] || misused "$1 needs a value"
        case $1 in
        --domain) domain=$2 ;;
        --port) port=$2 ;;
        --storage-dir) storage=$2 ;;
        --upload-limit) limit=$2 ;;
        esac
        shift
        ;;
    --accel-redirect) accel=true ;;
    --open-registration) open=true ;;
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
    '' | *[!A-Za-z0-9.-]* | -* | .* | *..*) misused "--domain: '$1' is no host name" ;;
    esac
}
check_port() {
    case $1 in
    '' | *[!0-9]* | 0* | ??????*) misused "--port: '$1' is no port" ;;
    esac
    if [ "$1" -lt 1 ] || [ "$1" -gt 65535 ]; then misused "--port: '$1' is no port"; fi
}
check_folder() { # what has a meaning in nginx.conf or in a unit, and what is the system's
    case $1 in
    *[\"\\\$\;\{\}%\#\|\&\'\`:[:cntrl:]]*) misused "$2: '$1' cannot be used: it must not have \" ' \\ \$ ; { } % # | & \` : in it" ;;
    /run/media/*) ;;
    / | /bin | /bin/* | /boot | /boot/* | /dev | /dev/* | /etc | /etc/* | /home | /lib* | /media | \
        /mnt | /opt | /opt/mediaserver | /opt/mediaserver/* | /proc | /proc/* | /root | /run | /run/* | \
        /sbin | /sbin/* | /srv | /sys | /sys/* | /tmp | /usr | /usr/* | /var | /var/lib | /var/tmp) misused "$2: '$1' is the system's" ;;
    *//* | */. | */./* | */.. | */../*) misused "$2: '$1' has . or .. or // in it" ;;
    /*) ;;
    *) misused "$2: '$1' is not an absolute path" ;;
    esac
}
parse_size() { # bytes of 500M or 2G
    digits=${1%[KkMmGg]}
    case $digits in
    '' | *[!0-9]* | ????????????????*) misused "--upload-limit: '$1' is no size such as 500M or 2G" ;;
    esac
    while :; do case $digits in 0?*) digits=${digits#0} ;; *) break ;; esac done # 010 is ten
    case $1 in
    *[Kk]) unit=1024 ;;
    *[Mm]) unit=1048576 ;;
    *[Gg]) unit=1073741824 ;;
    *) unit=1 ;;
    esac
    [ "$digits" -le $((1000000000000000 / unit)) ] || misused "--upload-limit: $1 is more than a disk holds"
    echo $((digits * unit))
}

[ -z "$domain" ] || check_domain "$domain"
[ -z "$port" ] || check_port "$port"
if [ -n "$storage" ]; then
    case $storage in /*) ;; *) storage=$PWD/${storage#./} ;; esac
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
readers=mediaserver-pictures # the group of nginx's user: what else is the service's stays closed to it
launcher=$root/usr/local/bin/media-server
systemctl=${SYSTEMCTL:-systemctl}
nginx=${NGINX:-nginx}

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
folder() { # folder MODE OWNER PATH: a folder of root's, made if it is not there
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
helper() { # helper WHAT WORD...: what a shell cannot do safely; values are its arguments, never its text
    python3 -I -S -B - "$source/mediaserver.py" "${root:-/}" "$@" <<'END'
import os, pwd, re, stat, sys

program, root, what, *words = sys.argv[1:]
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def load():
    """The program as a module, for which there is time where a .env is read, and only there."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("mediaserver", program)
    sys.modules["mediaserver"] = ms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ms)
    return ms


def enter(path, make=False):
    """Open a folder below `root`, no component of which is a link; tell whether it is new."""
    at, new = os.open(root, os.O_RDONLY | os.O_DIRECTORY), False
    for name in filter(None, path.split("/")):
        try:
            try:
                at, new = os.open(name, FOLDER, dir_fd=at), False
            except FileNotFoundError:
                if not make:
                    raise
                os.mkdir(name, 0o755, dir_fd=at)
                at, new = os.open(name, FOLDER, dir_fd=at), True
        except OSError as error:
            problem = "is a link, or no folder: give the real path" if not isinstance(
                error, (FileNotFoundError, PermissionError)) else error.strerror
            sys.exit(f"setup: {path}: '{name}' {problem}")
    return at, new


def read(path):
    """The text of a regular file; none where it is missing, an error where it is something else."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return ""
    except OSError as error:
        sys.exit(f"setup: {path}: {error.strerror}")
    if not stat.S_ISREG(os.fstat(file).st_mode):
        sys.exit(f"setup: {path} is no file")
    with open(file, encoding="utf-8-sig") as opened:
        return opened.read()


PIECE = re.compile(r"""'([^']*)'|"((?:[^"\\]|\\.)*)"|\\(.)|([^'"\\]+|.)""", re.S)


def values(text):
    """NAME and value of each line, as systemd reads them (systemd.exec, EnvironmentFile=)."""
    for name, value in re.findall(r"^[ \t]*([A-Z0-9_]+)[ \t]*=[ \t]*(.*?)[ \t\r]*$", text, re.M):
        yield name, "".join(
            single or re.sub(r'\\(["\\`$])', r"\1", double) or escaped or plain
            for single, double, escaped, plain in PIECE.findall(value)
        )


def get(path, name):
    print(dict(values(read(path))).get(name, ""))


def place(path, name, default):
    """The folder that a setting names, as the service finds it from its working directory."""
    value = dict(values(read(path))).get(name) or default
    value = default if value.startswith("s3://") else value  # which needs no folder
    value = re.sub("^~(?=/|$)", "/var/lib/mediaserver", value)
    parts = os.path.join("/var/lib/mediaserver", value).split("/")
    print("/" + "/".join(part for part in parts if part not in ("", ".")))


def put(path, name, value):
    """The file's text, in which the setting has this value; all other lines are as they were."""
    if not re.fullmatch(r"[A-Za-z0-9_./:,@+=*-]*", value):
        value = '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    lines = re.sub(rf"^[ \t]*{name}[ \t]*=.*\n?", "", read(path), flags=re.M)
    print(f"{lines.rstrip()}\n{name}={value}")


def found(path, which):
    """NAME VALUE of each setting (or only of the secrets) in a .env, as the program reads it."""
    if not (text := read(path)):
        return
    ms = load()
    known = {name.upper(): setting for name, setting in ms.SETTINGS.items()}
    for name, value in ms.parse_dotenv(text, {}).items():
        setting = known.get(name)
        if setting is None or not setting.environment or not value or "\n" in value or (which == "secrets" and not setting.secret):
            continue
        if setting.parse is ms.parse_path or (setting.parse is ms.parse_place and "://" not in value):
            value = os.path.join(os.path.dirname(path), os.path.expanduser(value))
            value = os.path.normpath(value)
        try:
            setting.parse(value)
        except ValueError as error:
            sys.exit(f"setup: {name}: {error}")
        print(name, value)


def real(*paths):
    """Refuse a path with a link in it, as far as it is there."""
    for path in paths:
        while path != "/" and not os.path.lexists(root.rstrip("/") + path):
            path = os.path.dirname(path)
        if os.path.isdir(root):
            enter(path)


def make(path, mode, owner=""):
    """Make a folder where there is none; what is there stays as it is."""
    folder, new = enter(path, make=True)
    if new:
        if owner:
            user = pwd.getpwnam(owner)
            os.fchown(folder, user.pw_uid, user.pw_gid)
        os.fchmod(folder, int(mode, 8))


def give(path, owner, only=""):
    """Give a folder, and what in it is its owner's or root's alone, to another user.

    With `only`, refuse a folder that holds anything whose name does not begin with it.
    """
    top, _ = enter(path)
    user, own = pwd.getpwnam(owner), os.fstat(top).st_uid
    if own == user.pw_uid:
        return
    others = [name for name in os.listdir(top) if not name.startswith(only)]
    if others or any(os.path.normpath(one.pw_dir) == path for one in pwd.getpwall()):
        sys.exit(f"setup: {path} holds more than the server's files: give these a folder of their own")
    os.fchown(top, user.pw_uid, user.pw_gid)
    for _, folders, files, at in os.fwalk(".", dir_fd=top, follow_symlinks=False):
        for name in folders + files:
            item = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=at)
            facts = os.fstat(item)
            plain = stat.S_ISDIR(facts.st_mode) or (
                stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1)
            if plain and facts.st_uid == own:
                os.chown(f"/proc/self/fd/{item}", user.pw_uid, user.pw_gid)
            os.close(item)


def act(path, name, *command):
    """Run a command in a folder as a user, or as whoever owns the folder.

    It has nothing of root's: not the terminal either, in which its user could type with it.
    """
    import subprocess

    at, _ = enter(path)
    who = {}
    if root == "/":
        user = pwd.getpwnam(name) if name else pwd.getpwuid(os.fstat(at).st_uid)
        groups = os.getgrouplist(user.pw_name, user.pw_gid)
        who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": groups}
    done = subprocess.run(
        command, cwd=f"/proc/self/fd/{at}", env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True, **who,
    )
    for line in done.stderr.decode(errors="replace").splitlines()[:3]:
        print("setup:", ascii(line)[1:-1], file=sys.stderr)
    sys.exit(done.returncode)


def owner(path):
    print(pwd.getpwuid(os.fstat(enter(path)[0]).st_uid).pw_name)


def limit(small, large):
    """The larger of the two limits in MiB, and 2 for the form around the file."""
    sizes = int(small or 10 << 20), int(large or 1 << 30)
    print(f"{-(-max(sizes) // 1048576) + 2}m")


def render(path, domain, port, limit, certificate, http2, ipv6, *folders):
    """The site: nginx.conf with these values in the places of its examples."""
    text = read(path)
    changes = {
        "/etc/letsencrypt/live/photos.example.org": certificate,
        "photos.example.org": domain,
        "127.0.0.1:8000": f"127.0.0.1:{port}",
        "client_max_body_size 1026m": f"client_max_body_size {limit}",
    }
    for name, folder in zip(("pictures", "data/images", "data/entities", "data/users"), folders):
        changes[f"alias /var/lib/mediaserver/{name}/;"] = f'alias "{folder}/";'
        changes[f"from=/var/lib/mediaserver/{name}/;"] = f'"from={folder}/";'
    if missing := [old for old in changes if old not in text]:
        sys.exit(f"setup: nginx.conf has no {missing[0]}")
    text = re.sub("|".join(map(re.escape, changes)), lambda found: changes[found[0]], text)
    if http2:
        text = re.sub(r"(?m)^( *)listen 443 ssl http2;", r"\1http2 on;\n\1listen 443 ssl;", text)
        text = text.replace(" ssl http2;", " ssl;")
    print(text if ipv6 else re.sub(r"(?m)^ *listen \[::\].*\n", "", text), end="")


try:
    globals()[what](*words)
except (OSError, UnicodeDecodeError, KeyError, ValueError) as error:
    sys.exit(f"setup: {what} {words[0]}: {error}")
END
}

# --- settings ---

working=$(mktemp) # the settings as they will be; they become the file when all of them are good
trap 'rm -f "$working"' EXIT
trap 'exit 130' HUP INT TERM
if [ -r "$settings" ]; then cat "$settings" >"$working"; fi

get() { # the value of a setting in mediaserver.env, or nothing
    if grep -q "$1" "$working"; then helper get "$working" "$1"; fi
}
put() { # put NAME VALUE: the setting now has this value; all other lines stay
    text=$(helper put "$working" "$1" "$2")
    [ -z "$dry" ] || printf '    set %s in %s\n' "$1" "$settings"
    printf '%s\n' "$text" >"$working"
}
keep() { # keep NAME VALUE: give a setting a value if it has none
    old=$(get "$1")
    [ -n "$old" ] || put "$1" "$2"
}
adopt() { # adopt FILE settings|secrets: what the file gives, where there is no value yet
    lines=$(helper found "$1" "$2") || die "$1 cannot be used; it may hold secrets, so nothing was changed"
    [ -n "$lines" ] || return 0
    while IFS= read -r line; do keep "${line%% *}" "${line#* }"; done <<END
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
    if live && [ -n "$dry" ] && [ "$(id -u)" -ne 0 ]; then
        warn "only root can read the settings of an installation: this is the plan for a new one"
    fi
    have python3 || die "Python is missing: apt-get install python3"
    python3 -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "Python 3.10 or later is needed; this is $(python3 --version)"
    python3 -I -B "$source/mediaserver.py" --version >/dev/null || die "mediaserver.py does not start here"
    live || return 0
    missing=''
    have "$nginx" || missing="$missing nginx"
    python3 -I -c 'import PIL' 2>/dev/null || missing="$missing python3-pil"
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
    python3 -I -c 'import PIL' 2>/dev/null || warn "without python3-pil there are no thumbnails (--install)"
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
    # Its bytecode stays beside it, where the service may not write: with it, the service is 46 MB smaller
    if live; then run python3 -I "$program/mediaserver.py" --version; fi
    folder 0755 root:root "$(dirname "$launcher")"
    write 0755 root:root "$launcher" <<'END'
#!/usr/bin/python3 -I
"""media-server --storage_dir DIR ... runs the program; as root and without a folder, its commands (token,
user, verify ...) run on the installed service's folder, with its settings and as its user."""
import os, re, sys

PROGRAM, SETTINGS = "/opt/mediaserver/mediaserver.py", "/etc/mediaserver/mediaserver.env"
PIECE = re.compile(r"""'([^']*)'|"((?:[^"\\]|\\.)*)"|\\(.)|([^'"\\]+|.)""", re.S)
command = [sys.executable, PROGRAM, *sys.argv[1:]]
given = "STORAGE_DIR" in os.environ or any(
    re.match("--storage[_-]dir", word) for word in sys.argv[1:])
if not given and os.getuid() == 0 and os.path.exists(SETTINGS):
    text = open(SETTINGS, encoding="utf-8").read()
    for name, value in re.findall(r"^[ \t]*([A-Z0-9_]+)[ \t]*=[ \t]*(.*?)[ \t\r]*$", text, re.M):
        os.environ[name] = "".join(
            single or re.sub(r'\\(["\\`$])', r"\1", double) or escaped or plain
            for single, double, escaped, plain in PIECE.findall(value)
        )
    os.umask(0o077)
    os.chdir("/var/lib/mediaserver")
    command[:0] = ["setpriv", "--reuid=mediaserver", "--regid=mediaserver", "--init-groups", "--"]
    os.environ["PATH"] = "/usr/local/bin:/usr/bin:/bin"
os.execvp(command[0], command)
END
}

configure() {
    say "settings: $settings (what is there is kept)"
    new=''
    if [ ! -f "$settings" ]; then
        new=yes
        cat >"$working" <<'END'
# mediaserver's settings, all of README.md's table; setup.sh changes only what its options name.
# After a change: sudo systemctl restart mediaserver (sizes, port and folders: run setup.sh again)
END
    fi
    adopt "$source/.env" settings
    [ -z "$storage" ] || put STORAGE_DIR "$storage"
    keep STORAGE_DIR "${storage:-$state/pictures}"
    pictures=$(helper place "$working" STORAGE_DIR "")
    # The layout of a server that was started by hand: DATA lies in the folder, and stays there
    if [ -e "$root$pictures/.mediaserver/secrets.env" ] || [ -e "$root$pictures/.mediaserver/index.sqlite3" ]; then
        keep DATABASE_DIR "$pictures/.mediaserver"
        new='' # who may register stays as it was
    fi
    keep DATABASE_DIR "$state/data"
    data=$(helper place "$working" DATABASE_DIR "")
    index=$(get DATABASE_URL)
    case $index in
    sqlite:////*)
        index_name=$(basename "$index")
        index=$(dirname "${index#sqlite:///}")
        ;;
    *) index=$data/users ;; # any folder in DATA: nothing is to be done for those
    esac
    images=$(helper place "$working" UPLOAD_DIR "$data/images")
    entities=$(helper place "$working" MEDIA_STORAGE_DIR "$data/entities")
    users=$(helper place "$working" USERS_DIR "$data/users")
    check_folder "$pictures" STORAGE_DIR
    check_folder "$data" DATABASE_DIR
    check_folder "$index" DATABASE_URL
    check_folder "$images" UPLOAD_DIR
    check_folder "$entities" MEDIA_STORAGE_DIR
    check_folder "$users" USERS_DIR
    helper real "$pictures" "$data" "$index" "$images" "$entities" "$users"
    adopt "$root$data/secrets.env" secrets
    [ -z "$open" ] || put ALLOW_REGISTRATION true
    [ -z "$new" ] || keep ALLOW_REGISTRATION false
    for name in MEDIA_SERVER_SECRET AUTH_TOKEN JWT_SIGNING_KEY; do
        keep "$name" "$(new_secret)"
    done
    old_url=https://$(get DOMAIN)
    domain=$(printf '%s' "$domain" | tr '[:upper:]' '[:lower:]') # as nginx compares it
    [ -z "$domain" ] || put DOMAIN "$domain"
    keep DOMAIN "$(uname -n | cut -d. -f1).local"
    domain=$(get DOMAIN)
    check_domain "$domain"
    url=$(get PUBLIC_URL)
    if [ -n "$new" ]; then
        keep PUBLIC_URL "https://$domain"
    elif [ "$url" = "$old_url" ] && [ "$url" != "https://$domain" ]; then
        put PUBLIC_URL "https://$domain"
    fi
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
    # systemd reads them as root: the service's group, in which nginx's user may be, need not
    folder 0700 root:root "$config"
    if [ -d "$config" ]; then own 0700 root:root "$config"; fi
    if ! cmp -s "$working" "$settings"; then write 0600 root:root "$settings" <"$working"; fi
    if [ -f "$settings" ]; then own 0600 root:root "$settings"; fi
}

make_folders() {
    say "data: $data; pictures: $pictures"
    service=''
    if live; then service=mediaserver; fi
    folder 0700 mediaserver:mediaserver "$root$state"
    run helper make "$data" 0700 "$service"
    run helper make "$pictures" 0750 "$service"
    for path in "$index" "$images" "$entities" "$users"; do
        case $path in "$data" | "$data"/*) ;; *) run helper make "$path" 0700 "$service" ;; esac
    done
    live || return 0
    for path in "$data" "$index" "$images" "$entities" "$users"; do
        case $path in
        $state/* | "$data"/*) ;;
        "$index") run helper give "$path" mediaserver "$index_name" ;;
        *) run helper give "$path" mediaserver ;;
        esac
    done
    case $pictures in $state/*) return 0 ;; esac
    [ -d "$pictures" ] || return 0 # with --dry-run
    owner=$(helper owner "$pictures")
    [ "$owner" != mediaserver ] || return 0
    check_chain
    say "$pictures is $owner's: the service may read and write there, $owner keeps what it may"
    for hidden in "$pictures/.incoming" "$pictures/.thumbnails"; do # of a server started by hand
        [ ! -d "$hidden" ] || run helper give "$hidden" mediaserver
    done
    grant=u:mediaserver:rwX,u:$owner:rwX
    run helper act "$pictures" '' find . ! -user "$owner" -prune -o -type f -exec setfacl -m "$grant" '{}' + \
        -o -type d -exec setfacl -m "$grant,d:u:mediaserver:rwX,d:u:$owner:rwX" '{}' + || cannot_grant
    parent=$(dirname "$pictures")
    while [ "$parent" != / ]; do # such as a home folder with mode 0700
        run helper act "$parent" mediaserver test -x . ||
            run helper act "$parent" '' setfacl -m u:mediaserver:x . || cannot_grant
        parent=$(dirname "$parent")
    done
}

check_chain() { # whose folders the pictures lie in: what root does by path, nobody else can lead elsewhere
    path=$pictures roots=''
    while [ "$path" != / ]; do
        case $(helper owner "$path"):$roots in
        root:*) roots=$path ;;
        *:?*) die "$roots is root's, but lies in a folder of $(helper owner "$path")'s: give it to them (chown)" ;;
        esac
        path=$(dirname "$path")
    done
}

cannot_grant() {
    warn "the service may not write to $pictures: no setfacl (run again with --install), or a file"
    warn "system without access lists (mount it with uid=mediaserver); until then it only reads, if that"
}

write_units() {
    say "systemd: mediaserver.service and mediaserver.socket on 127.0.0.1:$port (a restart loses no connection)"
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
RequiresMountsFor="$data" "$index" "$images" "$entities" "$users"
[Service]
$(for path in "$pictures" "$data" "$index" "$images" "$entities" "$users"; do
        case $path in
        $state/* | "$data"/*) ;;
        /home/*/*) # root mounts what lies in /home itself, and the service goes on from there: a link
            # that the folder's owner puts in its place leads where the service may go, not where root may
            home=${path#/home/}
            printf '%s\n' "BindReadOnlyPaths=\"-/home/${home%%/*}\"" "ReadWritePaths=\"-$path\""
            ;;
        /home/*) echo "BindPaths=\"-$path\"" ;;
        *) echo "ReadWritePaths=\"-$path\"" ;;
        esac
    done)
$([ "$accel" != true ] || echo "StateDirectoryMode=0711
UMask=0027")
END
}

let_nginx_read() {
    if live; then
        case " $(id -nG www-data 2>/dev/null) " in *' mediaserver '*) run gpasswd -d www-data mediaserver ;; esac
    fi
    [ "$accel" = true ] || return 0
    case $pictures in
    $state/*) ;;
    *)
        say "nginx sends those pictures that $pictures lets everyone read, the server all others"
        return 0
        ;;
    esac
    say "nginx may read the pictures: www-data joins the group $readers"
    run chmod 0711 "$root$state"
    user='' join=true
    if live; then
        getent group $readers >/dev/null || run groupadd --system $readers
        run usermod -aG $readers mediaserver # or it could not give them to the group
        run usermod -aG $readers www-data
        user=mediaserver join="chgrp -h $readers"
    fi
    # shellcheck disable=SC2086 # several words
    run helper act "$pictures" "$user" find . \
        -name .incoming -prune -exec $join '{}' + -exec chmod go=,g+s '{}' + \
        -o -name '.?*' -prune -exec chmod go= '{}' + \
        -o -type d -exec $join '{}' + -exec chmod g=rxs,o= '{}' + \
        -o -type f -exec $join '{}' + -exec chmod g+r '{}' + ||
        warn "some are not the service's own: the server goes on to send them"
    for path in "$data" "$index" "$images" "$entities" "$users"; do
        case $path in "$pictures"/*) run helper act "$path" "$user" chmod go= . ;; esac
    done
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

new_http2() { # whether nginx has `http2 on` (1.25.1) and warns of `listen … http2`
    version=$("$nginx" -v 2>&1 | sed -n 's#.*nginx/\([0-9.]*\).*#\1#p')
    [ "$(printf '%s\n' "$version" 1.25.1 | sort -V | head -n 1)" = 1.25.1 ]
}

render_site() {
    http2=''
    if new_http2; then http2=yes; fi
    ipv6=''
    if [ -e /proc/net/if_inet6 ]; then ipv6=yes; fi # nginx would not start without it
    size=$(helper limit "$(get MAX_UPLOAD_BYTES)" "$(get MAX_MEDIA_BYTES)") || return 1
    helper render "$source/nginx.conf" "$domain" "$port" "$size" "$certificate" "$http2" "$ipv6" \
        "$pictures" "$images" "$entities" "$users"
}

install_site() {
    say "nginx: the site $domain"
    folder 0755 root:root "$acme"
    folder 0755 root:root "$(dirname "$site")"
    folder 0755 root:root "$(dirname "$enabled")"
    find_certificate
    mark=$config/site.sha256
    text=$(render_site) || die "the site cannot be made: nothing was changed"
    if [ -f "$site" ] && ! sha256sum --status -c "$mark" 2>/dev/null; then
        printf '%s\n' "$text" | write 0644 root:root "$config/site.new"
        warn "$site was changed by hand and stays; compare it with $config/site.new"
        return 0
    fi
    if [ -z "$dry" ] && [ -f "$site" ]; then cp -p "$site" "$site.before"; fi
    printf '%s\n' "$text" | write 0644 root:root "$site"
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
    python3 -I - "$port" <<'END' 2>/dev/null
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
    say "removing settings, secrets and data: $config $root$state"
    run rm -rf --one-file-system "$config" "$root$state" "$acme" || # a disk that is mounted there stays
        die "something is mounted below $root$state; it and what is above it stays"
    kept=''
    for name in STORAGE_DIR DATABASE_DIR DATABASE_URL UPLOAD_DIR MEDIA_STORAGE_DIR USERS_DIR; do
        path=$(get $name)
        case ${path#sqlite:///} in
        '' | $state/* | [!/~]*) ;;
        *) kept=yes && say "$path stays, with all that lies in it ($name)" ;;
        esac
    done
    live && id mediaserver >/dev/null 2>&1 || return 0
    if [ -n "$kept" ]; then
        say "so does the user mediaserver: another one with its number would own what it owns there"
        return 0
    fi
    run userdel mediaserver
    for group in mediaserver $readers; do
        if getent group "$group" >/dev/null; then run groupdel "$group"; fi
    done
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
case $(get ALLOW_REGISTRATION) in
false) say "nobody can register an account: run this again with --open-registration if anyone may" ;;
esac
say "done: https://$domain/ (the owner's key: sudo grep AUTH_TOKEN $settings)"
