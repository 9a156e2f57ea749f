//! Whatever the disk does, the list stays, the log says why and where, each refresh tries again, and all is well once the
//! trouble is over.
//!
//! A full and a read-only disk are mounted in a separate user namespace, which does not take root.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::binary;
use crate::support::cloud::Cloud;
use crate::support::executable;
use crate::support::fleet::many;
use crate::support::moments::{Moments, unfinished};
use crate::support::sidecar::{PATIENCE, Running, Sidecar, finish, pid};
use rustix::process::{Resource, Rlimit, geteuid, prlimit};

const FILE: &str = "disk/balena.json";

/// A sidecar that keeps its list in a separate folder, where the trouble is going to be.
fn sidecar(cloud: &Cloud) -> Sidecar {
    let sidecar = binary::sidecar(cloud).env("SD_FILE_PATH", FILE);
    fs::create_dir(sidecar.path("disk")).unwrap();
    sidecar
}

/// The list as it should be.
fn due(sidecar: &Sidecar) -> String {
    let mut dry = sidecar.command();
    dry.arg("--dry-run");
    String::from_utf8(finish(dry).stdout).unwrap()
}

/// What happens to the disk between two changes of the fleet, seen from `root`.
struct Trouble<'a> {
    cloud: &'a Cloud,
    sidecar: &'a Sidecar,
    running: &'a Running,
    root: PathBuf,
    /// Words of the reason in the log.
    says: &'a str,
    /// Whether the old list is still there to be kept.
    keeps: bool,
}

impl Trouble<'_> {
    fn befalls(&self, cause: impl FnOnce(), cure: impl FnOnce()) {
        let (file, running) = (self.root.join(FILE), self.running);
        running.wait_for("updated disk/balena.json");
        let before = fs::read(&file).unwrap();
        cause();
        self.cloud.change(|devices| devices[0]["device_name"] = format!("not {}", devices[0]["device_name"]).into());
        // The second time nothing is new but that it was not written yet.
        for count in 1..=2 {
            let line = running.wait_for_lines("refresh failed", count);
            let (_, reason) = line.split_once("refresh failed: cannot write ").unwrap_or_else(|| panic!("{line}"));
            assert!(reason.contains(FILE) && reason.contains(self.says), "{line}");
            let becomes = if fs::symlink_metadata(&file).is_ok() { "stays as it is" } else { "does not exist" };
            let says = format!("--sd-file (SD_FILE_PATH); disk/balena.json {becomes}, next try in ");
            assert!(reason.contains(&says), "{line}");
        }
        assert!(self.cloud.requests().iter().rev().take(4).any(|seen| seen.status == 304));
        if self.keeps {
            assert_eq!(fs::read(&file).unwrap(), before);
        }
        assert_eq!(running.log().iter().filter(|line| line.contains("updated")).count(), 1);
        cure();
        running.signal("HUP");
        running.wait_for_lines("updated disk/balena.json", 2);
        assert_eq!(fs::read_to_string(&file).unwrap(), due(self.sidecar));
        assert_eq!(unfinished(&self.root.join("disk/.balena.json.tmp")), [""; 0]);
    }
}

/// Starts it where `mount` has mounted something, and gives the path by which this test sees what it sees.
pub fn start_in_namespace(sidecar: &Sidecar, mount: &str) -> (Running, PathBuf) {
    let unshare = ["--user", "--map-root-user", "--mount", "sh", "-c"];
    let tried = Command::new("unshare").args(unshare).arg("mount -t tmpfs none /tmp").output();
    let tried = tried.expect("`unshare`: install the package util-linux");
    assert!(
        tried.status.success(),
        "this test mounts disks of its own in a user namespace, which is forbidden here: {}\n\
         in a container: allow it by `--security-opt seccomp=unconfined --security-opt apparmor=unconfined`; on Ubuntu: by \
         `sysctl kernel.apparmor_restrict_unprivileged_userns=0`",
        String::from_utf8_lossy(&tried.stderr)
    );
    let inside = sidecar.command();
    let mut command = Command::new("unshare");
    command.args(unshare).args([&format!("{mount} && exec \"$@\""), "sh"]).arg(inside.get_program());
    let set = inside.get_envs().filter_map(|(name, value)| Some((name, value?)));
    command.args(inside.get_args()).env_clear().envs(set).current_dir(sidecar.dir.path());
    let running = Running::spawn(command);
    running.wait_for("baletheus"); // no shell any more
    let seen = PathBuf::from(format!("/proc/{}/root", running.id()));
    let root = seen.join(sidecar.dir.path().strip_prefix("/").unwrap());
    (running, root)
}

/// Runs a script where it runs, with the path of its disk as `$1`.
fn in_namespace(running: &Running, sidecar: &Sidecar, script: &str) {
    let of = running.id().to_string();
    let mut nsenter = Command::new("nsenter");
    nsenter.args(["--target", &of, "--user", "--mount", "--preserve-credentials", "sh", "-c", script, "sh"]);
    run(nsenter.arg(sidecar.path("disk")));
}

fn run(command: &mut Command) {
    let output =
        command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; install the package util-linux"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_disk_that_is_full() {
    let cloud = Cloud::start(many(200));
    let sidecar = sidecar(&cloud);
    let (running, root) = start_in_namespace(&sidecar, "mount -t tmpfs -o size=1M,mode=755 none disk");
    let ballast = root.join("disk/ballast");
    let fill = || {
        let mut file = File::create(&ballast).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        // Some of the new list finds room, its end does not.
        file.set_len(file.metadata().unwrap().len() - 16384).unwrap();
    };
    let trouble = Trouble {
        cloud: &cloud,
        sidecar: &sidecar,
        running: &running,
        root,
        says: "No space left on device",
        keeps: true,
    };
    trouble.befalls(fill, || fs::remove_file(&ballast).unwrap());
}

#[test]
fn a_disk_that_becomes_read_only() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let (running, root) = start_in_namespace(&sidecar, "true");
    let inside = |script: &str| in_namespace(&running, &sidecar, script);
    let trouble = Trouble {
        cloud: &cloud,
        sidecar: &sidecar,
        running: &running,
        root,
        says: "Read-only file system",
        keeps: true,
    };
    trouble.befalls(
        || inside("mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\""),
        || inside("umount \"$1\""),
    );
}

/// A quota is like it: the disk has room, but not for this one. Without a namespace, so it runs anywhere.
#[test]
fn a_file_that_may_not_grow() {
    let cloud = Cloud::start(many(200));
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("updated");
    let limit = |current| {
        prlimit(Some(pid(running.id())), Resource::Fsize, Rlimit { current, maximum: None }).unwrap();
    };
    let root = sidecar.dir.path().to_owned();
    let trouble =
        Trouble { cloud: &cloud, sidecar: &sidecar, running: &running, root, says: "File too large", keeps: true };
    trouble.befalls(|| limit(Some(20_000)), || limit(None));
}

/// Somebody who is not root.
pub const USER: u32 = 65534;

/// Its command as somebody who is not root, whom no mode keeps out.
pub fn as_user(sidecar: &Sidecar) -> Command {
    let inside = sidecar.command();
    if !geteuid().is_root() {
        return inside;
    }
    // Where cargo built it there may be no way for this user.
    let (binary, user) = (sidecar.path("baletheus"), USER);
    executable::copy(binary::path().as_ref(), &binary);
    for path in [sidecar.dir.path(), &sidecar.path("disk")] {
        chown(path, Some(user), Some(user)).unwrap();
    }
    let mut command = Command::new(binary);
    let set = inside.get_envs().filter_map(|(name, value)| Some((name, value?)));
    command.env_clear().envs(set).current_dir(sidecar.dir.path()).uid(user).gid(user);
    command
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[test]
fn no_permission() {
    for (path, mode, keeps) in [("disk", 0o555, true), ("disk", 0, false), ("disk/.balena.json.tmp", 0o555, true)] {
        let cloud = Cloud::start(many(20));
        let sidecar = sidecar(&cloud);
        let running = Running::spawn(as_user(&sidecar));
        let (root, path) = (sidecar.dir.path().to_owned(), sidecar.path(path));
        // root still sees what is there
        let keeps = keeps || geteuid().is_root();
        let trouble =
            Trouble { cloud: &cloud, sidecar: &sidecar, running: &running, root, says: "Permission denied", keeps };
        trouble.befalls(|| chmod(&path, mode), || chmod(&path, 0o755));
    }
}

#[test]
fn no_permission_at_the_start() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let command = as_user(&sidecar);
    chmod(&sidecar.path("disk"), 0o555);
    let running = Running::spawn(command);
    let line = running.wait_for_lines("refresh failed", 2);
    assert!(line.contains("cannot write disk/balena.json: Permission denied"), "{line}");
    chmod(&sidecar.path("disk"), 0o755);
    running.signal("HUP");
    running.wait_for("updated disk/balena.json: 20 targets");
}

/// It may be a disk that is not mounted: the list would fill the disk below, and nobody would read it.
#[test]
fn a_directory_that_goes_is_not_made_again_before_the_next_start() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let (disk, root) = (sidecar.path("disk"), sidecar.dir.path().to_owned());
    let running = sidecar.start();
    let says = "its directory is gone: is a disk not mounted?";
    let trouble = Trouble { cloud: &cloud, sidecar: &sidecar, running: &running, root, says, keeps: false };
    let cause = || fs::remove_dir_all(&disk).unwrap();
    let cure = || {
        assert!(!disk.exists());
        fs::create_dir(&disk).unwrap();
    };
    trouble.befalls(cause, cure);
    drop(running);
    fs::remove_dir_all(&disk).unwrap();
    let log = sidecar.oneshot();
    assert!(log.contains("made the folder disk: it was not there"), "{log}");
    assert_eq!(fs::read_to_string(sidecar.path(FILE)).unwrap(), due(&sidecar));
}

/// Its mount point is there without it.
#[test]
fn a_disk_that_is_unmounted() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let (running, root) = start_in_namespace(&sidecar, "mount -t tmpfs -o mode=755 none disk");
    let inside = |script: &str| in_namespace(&running, &sidecar, script);
    let says = "its directory is gone: is a disk not mounted?";
    let trouble = Trouble { cloud: &cloud, sidecar: &sidecar, running: &running, root, says, keeps: false };
    let cure = || {
        assert!(!sidecar.path(FILE).exists(), "the list is below the mount point");
        inside("mount -t tmpfs -o mode=755 none \"$1\"");
    };
    trouble.befalls(|| inside("umount -l \"$1\""), cure);
}

#[test]
fn a_directory_that_goes_and_comes_back() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    let (disk, away, root) = (sidecar.path("disk"), sidecar.path("away"), sidecar.dir.path().to_owned());
    let trouble = Trouble {
        cloud: &cloud,
        sidecar: &sidecar,
        running: &running,
        root,
        says: "; disk is a file, not a directory",
        keeps: false,
    };
    // Something else has its name, so that it cannot be made.
    let cause = || {
        fs::rename(&disk, &away).unwrap();
        fs::write(&disk, "").unwrap();
    };
    let cure = || {
        fs::remove_file(&disk).unwrap();
        fs::rename(&away, &disk).unwrap();
    };
    trouble.befalls(cause, cure);
}

#[test]
fn a_directory_in_the_place_of_the_file() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    let (file, root) = (sidecar.path(FILE), sidecar.dir.path().to_owned());
    let trouble = Trouble {
        cloud: &cloud,
        sidecar: &sidecar,
        running: &running,
        root,
        says: "Is a directory (os error 21); remove the directory",
        keeps: false,
    };
    let cause = || {
        fs::remove_file(&file).unwrap();
        fs::create_dir_all(file.join("of/somebody")).unwrap();
    };
    trouble.befalls(cause, || fs::remove_dir_all(&file).unwrap());
}

#[test]
fn something_in_the_place_of_its_folder_or_its_lock() {
    for name in ["disk/.balena.json.tmp", "disk/.balena.json.tmp/lock"] {
        let cloud = Cloud::start(many(20));
        let sidecar = sidecar(&cloud);
        let running = sidecar.start();
        let (path, root) = (sidecar.path(name), sidecar.dir.path().to_owned());
        let folder = "disk/.balena.json.tmp";
        let trouble = Trouble { cloud: &cloud, sidecar: &sidecar, running: &running, root, says: folder, keeps: true };
        let cause = || {
            if name == folder {
                fs::remove_dir_all(&path).unwrap();
                fs::write(&path, "of somebody").unwrap();
            } else {
                fs::remove_file(&path).unwrap();
                fs::create_dir(&path).unwrap();
            }
        };
        let cure = || if name == folder { fs::remove_file(&path) } else { fs::remove_dir(&path) }.unwrap();
        trouble.befalls(cause, cure);
    }
}

#[test]
fn a_lock_of_another_kind_harms_nobody() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let (lock, other) = (sidecar.path("disk/.balena.json.tmp/lock"), sidecar.path("other"));
    fs::create_dir(lock.parent().unwrap()).unwrap();
    fs::write(&other, "of somebody").unwrap();
    for kind in ["a link", "a pipe"] {
        foreign(&lock, &other, kind);
        let running = sidecar.start();
        running.wait_for("20 targets on 20 devices");
        assert_eq!(fs::read(&other).unwrap(), b"of somebody");
        fs::remove_file(&lock).unwrap();
    }
}

/// What is in the place of the list.
fn foreign(file: &Path, other: &Path, kind: &str) {
    match kind {
        "garbage" => fs::write(file, [0xff, 0, b'{']).unwrap(),
        "nothing" => fs::write(file, "").unwrap(),
        "half a list" => fs::write(file, "[\n{\"targets\":[\"a.balena:80\"],\"labels\":{").unwrap(),
        "another's list" => fs::write(file, r#"[{"targets": ["other:80"], "labels": {"job": "other"}}]"#).unwrap(),
        "a pipe" => run(Command::new("mkfifo").arg(file)),
        "a socket" => drop(UnixListener::bind(file).unwrap()),
        "a link" => symlink(other, file).unwrap(),
        "a link to nowhere" => symlink("nowhere", file).unwrap(),
        "a file that nobody may read" => {
            fs::write(file, "[]").unwrap();
            chmod(file, 0);
        }
        kind => panic!("{kind}?"),
    }
}

#[test]
fn what_stands_in_the_way_is_replaced() {
    let cloud = Cloud::start(many(20));
    for kind in ["garbage", "nothing", "half a list", "another's list", "a file that nobody may read"] {
        let sidecar = sidecar(&cloud);
        let (file, other) = (sidecar.path(FILE), sidecar.path("other"));
        fs::write(&other, "of somebody").unwrap();
        let command = as_user(&sidecar);
        foreign(&file, &other, kind);
        let running = Running::spawn(command);
        running.wait_for("updated disk/balena.json: 20 targets");
        let is_right = || {
            assert_eq!(fs::read_to_string(&file).unwrap(), due(&sidecar), "{kind}");
            let metadata = fs::symlink_metadata(&file).unwrap();
            assert_eq!((metadata.is_file(), metadata.permissions().mode() & 0o777), (true, 0o644), "{kind}");
        };
        is_right();
        // and by whoever puts it there meanwhile, though the fleet does not change
        fs::remove_file(&file).unwrap();
        foreign(&file, &other, kind);
        running.wait_for_lines("updated disk/balena.json", 2);
        is_right();
        assert_eq!(fs::read(&other).unwrap(), b"of somebody", "{kind}");
        assert!(!running.log().iter().any(|line| line.contains("WARN")), "{kind}: {:#?}", running.log());
    }
}

#[test]
fn a_file_of_another_program_is_refused_at_the_start() {
    let cloud = Cloud::start(many(20));
    for text in ["global:\n  scrape_interval: 1m\n", "# mine\n", "\n{\"a\": 1}", "- targets: [a]\n"] {
        let sidecar = sidecar(&cloud);
        fs::write(sidecar.path(FILE), text).unwrap();
        let output = finish(sidecar.command());
        let log = String::from_utf8(output.stderr).unwrap();
        let says = "cannot write disk/balena.json: it is a file with something else than targets; remove it, if only";
        assert!(output.status.code() == Some(2) && log.contains(says), "{text}: {log}");
        assert_eq!(fs::read_to_string(sidecar.path(FILE)).unwrap(), text);
    }
}

/// The disk may come later, so the program goes on.
#[test]
fn a_folder_that_is_a_link_to_nothing_may_become_one() {
    let cloud = Cloud::start(many(20));
    let sidecar = Sidecar::of(binary::path(), &cloud).env("SD_FILE_PATH", "later/balena.json");
    let (link, folder) = (sidecar.path("later"), sidecar.path("mounted"));
    std::os::unix::fs::symlink(&folder, &link).unwrap();
    let running = sidecar.start();
    let line = running.wait_for("refresh failed: cannot write later/balena.json: ");
    assert!(line.contains("its folder is a link to nothing") && line.contains("is a disk not mounted?"), "{line}");
    fs::create_dir(&folder).unwrap();
    running.signal("HUP");
    running.wait_for("updated later/balena.json: 20 targets");
}

/// A list must replace no device of the machine. A link would be replaced as well, and Prometheus reads the file that it led to.
#[test]
fn what_is_no_file_is_refused() {
    let cloud = Cloud::start(many(20));
    for (kind, says) in
        [("a pipe", "a pipe"), ("a socket", "a socket"), ("a link", "a link"), ("a link to nowhere", "a link")]
    {
        let sidecar = sidecar(&cloud);
        let (file, other, root) = (sidecar.path(FILE), sidecar.path("other"), sidecar.dir.path().to_owned());
        fs::write(&other, "of somebody").unwrap();
        let says =
            format!("cannot write disk/balena.json: it is {says}; remove it, if only this program uses it, or set");
        foreign(&file, &other, kind);
        let stays = || {
            assert!(!fs::symlink_metadata(&file).unwrap().is_file(), "{kind}");
            assert_eq!(fs::read(&other).unwrap(), b"of somebody", "{kind}");
        };
        let output = finish(sidecar.command());
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && log.contains(&says), "{kind}: {log}");
        stays();
        // It appears later.
        fs::remove_file(&file).unwrap();
        let running = sidecar.start();
        let says = says.strip_prefix("cannot write ").unwrap();
        let trouble = Trouble { cloud: &cloud, sidecar: &sidecar, running: &running, root, says, keeps: false };
        let cause = || {
            fs::remove_file(&file).unwrap();
            foreign(&file, &other, kind);
        };
        let cure = || {
            stays();
            fs::remove_file(&file).unwrap();
        };
        trouble.befalls(cause, cure);
    }
    // As somebody who cannot harm the machine.
    let sidecar = sidecar(&cloud).env("SD_FILE_PATH", "/dev/null");
    let output = finish(as_user(&sidecar));
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && log.contains("cannot write /dev/null: it is a device; "), "{log}");
}

/// What looks like an unfinished list there is of somebody else.
#[test]
fn a_link_in_the_place_of_its_folder_is_not_followed() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let (other, folder) = (sidecar.path("other"), sidecar.path("disk/.balena.json.tmp"));
    fs::create_dir(&other).unwrap();
    fs::write(other.join("new-abc123"), "of somebody").unwrap();
    symlink(&other, &folder).unwrap();
    let running = sidecar.start();
    let line = running.wait_for("refresh failed: cannot write disk/balena.json: ");
    assert!(line.contains("disk/.balena.json.tmp is no folder of this user: remove it"), "{line}");
    assert_eq!(fs::read(other.join("new-abc123")).unwrap(), b"of somebody");
    assert_eq!(fs::read_dir(&other).unwrap().count(), 1);
    fs::remove_file(&folder).unwrap();
    running.signal("HUP");
    running.wait_for("updated disk/balena.json: 20 targets");
}

#[test]
fn a_folder_on_another_file_system_is_named() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let mount = "mkdir disk/.balena.json.tmp && mount -t tmpfs none disk/.balena.json.tmp";
    let (running, _) = start_in_namespace(&sidecar, mount);
    let line = running.wait_for("refresh failed: cannot write disk/balena.json: ");
    assert!(
        line.contains("; something is mounted at disk/.balena.json.tmp: unmount it, or set another --sd-file"),
        "{line}"
    );
}

#[test]
fn permissions_that_somebody_changes_are_put_right() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let running = Running::spawn(as_user(&sidecar));
    running.wait_for("updated disk/balena.json");
    for (count, mode) in [(2, 0), (3, 0o600), (4, 0o666)] {
        chmod(&sidecar.path(FILE), mode);
        running.wait_for_lines("updated disk/balena.json: 20 targets on 20 devices (devices: +0 -0 ~0)", count - 1);
        let found = fs::metadata(sidecar.path(FILE)).unwrap().permissions().mode() & 0o777;
        assert_eq!(found, 0o644, "after {mode:o}");
    }
}

#[test]
fn what_a_killed_write_left_goes_at_the_next_start_and_nothing_else() {
    let cloud = Cloud::start(Vec::new());
    let moments = Moments::of(&cloud, 5000);
    let sidecar = sidecar(&cloud);
    let scratch = sidecar.path("disk/.balena.json.tmp");
    let left = loop {
        let running = sidecar.start();
        cloud.wait_for_requests(1, PATIENCE);
        moments.drive(Some(&running));
        while unfinished(&scratch).is_empty() {}
        drop(running); // with SIGKILL
        cloud.clear_requests();
        if let Some(left) = unfinished(&scratch).pop() {
            break left;
        }
    };
    moments.drive(None);
    assert!(fs::read(scratch.join(&left)).is_ok());
    let foreign = [
        "disk/.balena.json.tmp/notes.txt",
        "disk/.balena.json.tmp/newer",
        "disk/.balena.json.tmp/new-year.txt",
        "disk/.balena.json.tmp/new-abcdefg",
        "disk/.balena.json.tmp/new-folder/file",
        "disk/.other.json.tmp/lock",
        &format!("disk/.other.json.tmp/{left}"),
        &format!("disk/{left}"),
        "disk/balena.json.tmp",
        "disk/.balena.json",
    ];
    for name in foreign {
        fs::create_dir_all(sidecar.path(name).parent().unwrap()).unwrap();
        fs::write(sidecar.path(name), "of somebody").unwrap();
    }
    sidecar.oneshot();
    for name in foreign {
        assert_eq!(fs::read_to_string(sidecar.path(name)).ok().as_deref(), Some("of somebody"), "{name}");
    }
    let mut all = unfinished(&scratch);
    all.sort();
    assert_eq!(all, ["new-abcdefg", "new-folder", "new-year.txt", "newer", "notes.txt"]);
}
