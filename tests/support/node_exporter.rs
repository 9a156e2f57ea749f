//! node_exporter with the flags of `examples/thingy`, and with the list of mounts that it would find on a device.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::grafana::list;
use super::sidecar::Running;
use super::tools;

/// The mounts that a container sees on balenaOS, in the form of `/proc/1/mounts`: its own `/`, a named volume, and the files
/// that the engine puts there. Written after Docker's and balenaOS' documentation, not recorded on a device.
pub const OF_THE_CONTAINER: &str = "\
overlay / overlay ro,relatime,lowerdir=/var/lib/docker/overlay2/l/A,upperdir=/var/lib/docker/overlay2/b/diff,workdir=/var/lib/docker/overlay2/b/work 0 0
proc /proc proc rw,nosuid,nodev,noexec,relatime 0 0
tmpfs /dev tmpfs rw,nosuid,size=65536k,mode=755 0 0
devpts /dev/pts devpts rw,nosuid,noexec,relatime,gid=5,mode=620,ptmxmode=666 0 0
sysfs /sys sysfs ro,nosuid,nodev,noexec,relatime 0 0
cgroup2 /sys/fs/cgroup cgroup2 ro,nosuid,nodev,noexec,relatime 0 0
mqueue /dev/mqueue mqueue rw,nosuid,nodev,noexec,relatime 0 0
shm /dev/shm tmpfs rw,nosuid,nodev,noexec,relatime,size=65536k 0 0
/dev/mmcblk0p6 /data ext4 rw,relatime 0 0
/dev/mmcblk0p6 /etc/resolv.conf ext4 rw,relatime 0 0
/dev/mmcblk0p6 /etc/hostname ext4 rw,relatime 0 0
/dev/mmcblk0p6 /etc/hosts ext4 rw,relatime 0 0
tmpfs /tmp/balena tmpfs rw,relatime 0 0
";

/// The mounts of the host, which a container with the label `io.balena.features.procfs` finds there instead.
pub const OF_THE_HOST: &str = "\
/dev/mmcblk0p2 /mnt/sysroot/active ext4 ro,relatime 0 0
overlay / overlay ro,relatime,lowerdir=/a,upperdir=/b,workdir=/c 0 0
devtmpfs /dev devtmpfs rw,relatime,size=469544k,nr_inodes=117386,mode=755 0 0
proc /proc proc rw,relatime 0 0
sysfs /sys sysfs rw,relatime 0 0
tmpfs /run tmpfs rw,nosuid,nodev,mode=755 0 0
tmpfs /tmp tmpfs rw,relatime 0 0
/dev/mmcblk0p1 /mnt/boot vfat rw,relatime 0 0
/dev/mmcblk0p5 /mnt/state ext4 rw,relatime 0 0
/dev/mmcblk0p5 /etc/hostname ext4 rw,relatime 0 0
/dev/mmcblk0p5 /var/lib/systemd ext4 rw,relatime 0 0
/dev/mmcblk0p6 /mnt/data ext4 rw,relatime 0 0
/dev/mmcblk0p6 /resin-data ext4 rw,relatime 0 0
/dev/mmcblk0p6 /var/lib/docker ext4 rw,relatime 0 0
/dev/mmcblk0p6 /var/volatile/lib ext4 rw,relatime 0 0
/dev/mmcblk0p6 /home/root ext4 rw,relatime 0 0
overlay /var/lib/docker/overlay2/abc/merged overlay rw,relatime,lowerdir=/a,upperdir=/b,workdir=/c 0 0
";

/// The example: what alerts and most panels read.
pub const LEAN: &str = "examples/thingy/docker-compose.yml";
/// With what other dashboards read.
pub const FULL: &str = "examples/thingy/full/docker-compose.yml";

/// The flags of node_exporter in a compose file of the project.
pub fn flags_of(compose: &str) -> Vec<String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(compose);
    let compose: Value = super::alerts::read(&file);
    let flags = list(&compose, "/services/node-exporter/command").iter();
    flags.map(|flag| flag.as_str().expect("a flag").to_owned()).collect()
}

/// Runs as in this compose file, in `folder`, where it finds these mounts and the rest of this machine's `/proc`; `/` and the named volume `/data` are
/// folders in there.
pub fn start(compose: &str, folder: &Path, mounts: &str) -> (Running, SocketAddr) {
    let (proc, root) = (folder.join("proc"), folder.join("root"));
    fs::create_dir_all(proc.join("1")).expect("a folder");
    fs::create_dir_all(root.join("data")).expect("a folder");
    for entry in fs::read_dir("/proc").expect("/proc") {
        let name = entry.expect("an entry").file_name();
        if name.to_string_lossy().parse::<u32>().is_err() {
            symlink(Path::new("/proc").join(&name), proc.join(&name)).expect("a link");
        }
    }
    fs::write(proc.join("1/mounts"), mounts).expect("written");
    fs::write(proc.join("1/mountinfo"), mount_info(mounts)).expect("written");

    let mut command = Command::new(tools::node_exporter());
    command.args(flags_of(compose).iter().filter(|flag| !flag.starts_with("--web.listen-address")));
    command.arg("--web.listen-address=127.0.0.1:0");
    command.arg(format!("--path.procfs={}", proc.display())).arg(format!("--path.rootfs={}", root.display()));
    let running = Running::spawn(command);
    let line = running.wait_for(r#"msg="Listening on""#);
    let address = line.split_whitespace().find_map(|word| word.strip_prefix("address="));
    (running, address.expect("an address").parse().expect("an address"))
}

/// The same as `/proc/1/mountinfo` has it, which newer versions of node_exporter read. The paths are those of the root.
pub fn mount_info(mounts: &str) -> String {
    let lines = mounts.lines().enumerate().map(|(number, line)| {
        let fields: Vec<_> = line.split(' ').collect();
        let [device, mount_point, kind, options] = fields[..4] else { panic!("{line}") };
        format!("{} 1 179:{number} / {mount_point} {options} - {kind} {device} {options}\n", number + 20)
    });
    lines.collect()
}
