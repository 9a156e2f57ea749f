//! A Raspberry Pi 4 with balenaOS as node_exporter sees it: the files of `/proc` and `/sys` that it reads, in the form that the
//! kernel's documentation gives them. Written after that documentation, not recorded on a board.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use super::node_exporter::{OF_THE_CONTAINER, mount_info};
use super::sidecar::Running;
use super::tools;

const INTERFACES: [&str; 6] = ["lo", "eth0", "wlan0", "balena0", "supervisor0", "resin-vpn"];
const CORES: usize = 4;

/// Files that are the same at each reading.
const FILES: [(&str, &str); 24] = [
    ("proc/loadavg", "0.31 0.42 0.38 2/311 41234\n"),
    ("proc/sys/fs/file-nr", "2240\t0\t9223372036854775807\n"),
    ("proc/pressure/cpu", "some avg10=0.12 avg60=0.08 avg300=0.05 total=41234567\n"),
    ("proc/pressure/io", PRESSURE),
    ("proc/pressure/memory", PRESSURE),
    (
        "proc/net/sockstat",
        "sockets: used 241\nTCP: inuse 12 orphan 0 tw 3 alloc 21 mem 2\nUDP: inuse 6 mem 1\nUDPLITE: inuse 0\n\
         RAW: inuse 0\nFRAG: inuse 0 memory 0\n",
    ),
    ("proc/net/sockstat6", "TCP6: inuse 4\nUDP6: inuse 3\nUDPLITE6: inuse 0\nRAW6: inuse 1\nFRAG6: inuse 0 memory 0\n"),
    (
        "proc/net/snmp",
        "Tcp: RtoAlgorithm RtoMin RtoMax MaxConn ActiveOpens PassiveOpens AttemptFails EstabResets CurrEstab InSegs OutSegs \
         RetransSegs InErrs OutRsts InCsumErrors\nTcp: 1 200 120000 -1 41234 9123 812 1203 11 2912345 3212345 8123 12 2312 0\n",
    ),
    ("proc/net/netstat", "TcpExt: SyncookiesSent SyncookiesRecv\nTcpExt: 0 0\n"),
    ("proc/net/snmp6", "Ip6InReceives 41234\n"),
    (
        "proc/vmstat",
        "nr_free_pages 380852\npgpgin 2406172\npgpgout 4561728\npswpin 301\npswpout 1041\npgfault 91234567\npgmajfault 12345\n\
         oom_kill 0\n",
    ),
    ("sys/devices/system/cpu/isolated", "\n"),
    ("sys/devices/system/cpu/online", "0-3\n"),
    ("sys/devices/system/cpu/offline", "\n"),
    ("sys/class/hwmon/hwmon0/name", "cpu_thermal\n"),
    ("sys/class/hwmon/hwmon0/temp1_input", "48199\n"),
    ("sys/class/hwmon/hwmon1/name", "rpi_volt\n"),
    ("sys/class/hwmon/hwmon1/in0_lcrit_alarm", "1\n"),
    ("sys/class/thermal/thermal_zone0/type", "cpu-thermal\n"),
    ("sys/class/thermal/thermal_zone0/temp", "48199\n"),
    ("sys/class/thermal/thermal_zone0/policy", "step_wise\n"),
    ("sys/devices/system/clocksource/clocksource0/available_clocksource", "arch_sys_counter\n"),
    ("sys/devices/system/clocksource/clocksource0/current_clocksource", "arch_sys_counter\n"),
    ("root/data/empty", ""),
];

const PRESSURE: &str = "some avg10=0.12 avg60=0.08 avg300=0.05 total=41234567\n\
    full avg10=0.00 avg60=0.00 avg300=0.00 total=1234567\n";

/// In kB.
const MEMORY: &str = "MemTotal 3884360 MemFree 1523408 MemAvailable 3012044 Buffers 84672 Cached 1389012 SwapCached 1204 \
    Active 812340 Inactive 1123456 Active(anon) 312044 Inactive(anon) 151020 Active(file) 500296 Inactive(file) 972436 \
    Unevictable 32 Mlocked 32 SwapTotal 1942176 SwapFree 1938012 Zswap 0 Zswapped 0 Dirty 412 Writeback 0 AnonPages 461208 \
    Mapped 312456 Shmem 12044 KReclaimable 98212 Slab 161044 SReclaimable 98212 SUnreclaim 62832 KernelStack 5008 \
    PageTables 11236 SecPageTables 0 NFS_Unstable 0 Bounce 0 WritebackTmp 0 CommitLimit 3884356 Committed_AS 1612044 \
    VmallocTotal 259653632 VmallocUsed 14212 VmallocChunk 0 Percpu 1984 HardwareCorrupted 0 AnonHugePages 0 \
    ShmemHugePages 0 ShmemPmdMapped 0 FileHugePages 0 FilePmdMapped 0 CmaTotal 524288 CmaFree 498112 Hugepagesize 2048 \
    Hugetlb 0";

fn stat() -> String {
    let cores: String = (0..CORES)
        .map(|core| {
            let (user, system) = (141_200 + core * 371, 90_310 + core * 97);
            format!("cpu{core} {user} 12 {system} 7241950 {} 0 {} 0 0 0\n", 3101 + core, 1290 + core)
        })
        .collect();
    format!(
        "cpu  567026 48 361822 28967800 12410 0 5166 0 0 0\n{cores}intr 91234567 0 0\nctxt 187654321\nbtime 1795000000\n\
         processes 412345\nprocs_running 2\nprocs_blocked 0\nsoftirq 41234567 12 9123456 3 1234567 234567 0 56789 8123456 4321 \
         9876543\n"
    )
}

/// The card and its six partitions, which the kernel lists as devices too, and what the exporter leaves out by itself.
fn diskstats() -> String {
    let none = [" 0"; 17].concat();
    let rams = (0..16).map(|at| format!("   1 {at:7} ram{at}{none}\n"));
    let loops = (0..8).map(|at| format!("   7 {at:7} loop{at}{none}\n"));
    let card = " 61234 20123 4812344 412345 212345 181234 9123456 2123456 0 1312345 2735801 0 0 0 0 41234 198765";
    let partitions = (1..=6).map(|at| {
        let figures = format!("{} 12 {} {} 212 181 91234 2123 0 1312 2735 0 0 0 0 0 0", at * 61, at * 481, at * 41);
        format!(" 179 {at:7} mmcblk0p{at} {figures}\n")
    });
    let card = std::iter::once(format!(" 179       0 mmcblk0{card}\n"));
    let zram = std::iter::once(format!(" 254       0 zram0{none}\n"));
    rams.chain(loops).chain(card).chain(partitions).chain(zram).collect()
}

fn net_dev() -> String {
    let moved = ["41234567 312345", "912345678 1412345", "1234567 12345", "0 0", "0 0", "51234567 212345"];
    let lines =
        INTERFACES.iter().zip(moved).map(|(name, moved)| format!("{name}: {moved} 0 0 0 0 0 0 {moved} 0 0 0 0 0 0\n"));
    format!(
        "Inter-|   Receive |  Transmit\n face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop \
         fifo colls carrier compressed\n{}",
        lines.collect::<String>()
    )
}

fn cpufreq() -> Vec<(String, String)> {
    let each = [
        ("affected_cpus", "0 1 2 3"),
        ("cpuinfo_max_freq", "1500000"),
        ("cpuinfo_min_freq", "600000"),
        ("cpuinfo_transition_latency", "0"),
        ("related_cpus", "0 1 2 3"),
        ("scaling_available_governors", "conservative ondemand userspace powersave performance schedutil"),
        ("scaling_cur_freq", "600000"),
        ("scaling_driver", "cpufreq-dt"),
        ("scaling_governor", "ondemand"),
        ("scaling_max_freq", "1500000"),
        ("scaling_min_freq", "600000"),
        ("scaling_setspeed", "<unsupported>"),
    ];
    let files = (0..CORES).flat_map(|core| {
        let file = move |(name, text): (&str, &str)| {
            (format!("sys/devices/system/cpu/cpu{core}/cpufreq/{name}"), format!("{text}\n"))
        };
        each.into_iter().map(file)
    });
    files.collect()
}

fn write(folder: &Path) {
    let mem_info = MEMORY.split_whitespace().collect::<Vec<_>>();
    let mem_info = mem_info.chunks(2).map(|pair| format!("{}: {} kB\n", pair[0], pair[1])).collect::<String>()
        + "HugePages_Total: 0\nHugePages_Free: 0\nHugePages_Rsvd: 0\nHugePages_Surp: 0\n";
    let made = [
        ("proc/stat", stat()),
        ("proc/diskstats", diskstats()),
        ("proc/net/dev", net_dev()),
        ("proc/meminfo", mem_info),
        ("proc/1/mounts", OF_THE_CONTAINER.to_owned()),
        ("proc/1/mountinfo", mount_info(OF_THE_CONTAINER)),
    ];
    let fixed = FILES.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned()));
    let made = made.into_iter().map(|(path, text)| (path.to_owned(), text));
    for (path, text) in fixed.chain(made).chain(cpufreq()) {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().expect("a folder")).and_then(|()| fs::write(path, text)).expect("written");
    }
}

/// The real node_exporter with these flags on such a board, whose files are in `folder`, and where it listens.
pub fn start(folder: &Path, flags: &[String]) -> (Running, SocketAddr) {
    write(folder);
    let mut command = Command::new(tools::node_exporter());
    command.args(flags.iter().filter(|flag| !flag.starts_with("--web.listen-address")));
    for root in ["procfs=proc", "sysfs=sys", "rootfs=root"] {
        let (name, path) = root.split_once('=').expect("two parts");
        command.arg(format!("--path.{name}={}", folder.join(path).display()));
    }
    // The files of the board, not this machine's interfaces by netlink.
    command.args(["--no-collector.netdev.netlink", "--web.listen-address=127.0.0.1:0"]);
    let running = Running::spawn(command);
    let line = running.wait_for(r#"msg="Listening on""#);
    let address = line.split_whitespace().find_map(|word| word.strip_prefix("address="));
    (running, address.expect("an address").parse().expect("an address"))
}
