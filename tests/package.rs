//! The Debian package as a user has it: installed, started, reloaded, upgraded and purged on a Debian with systemd, beside Debian's own
//! Prometheus, with a simulated balenaCloud and VPN. `scripts/check/deb` brings all that this needs, and takes it away again.

pub mod support {
    pub mod cloud;
    pub mod exporter;
    pub mod fleet;
    pub mod odata;
    pub mod recording;
    pub mod vpn;
}

use std::env;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use reqwest::blocking::Client;
use serde_json::Value;
use support::cloud::{Cloud, KEY};
use support::exporter::Exporters;
use support::fleet::demo_fleet;

const PATIENCE: Duration = Duration::from_secs(60);
const UNITS: [&str; 2] = ["baletheus", "baletheus-tunnel"];
const TARGETS: &str = "/var/lib/baletheus/balena.json";

/// What a command said, on both of its outputs.
struct Said {
    succeeded: bool,
    text: String,
}

/// Runs a line of shell on the machine that scripts/check/deb has booted.
fn run(script: &str) -> Said {
    let leader = env::var("MACHINE_LEADER").expect("run scripts/check/deb, which boots the machine");
    let enter = ["--target", &leader, "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--"];
    let output = Command::new("nsenter")
        .args(enter)
        .args([
            "/usr/bin/env",
            "-i",
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
            "DEBIAN_FRONTEND=noninteractive",
            "LC_ALL=C",
        ])
        .args(["sh", "-c", &format!("exec 2>&1; {script}")])
        .output()
        .expect("nsenter is in util-linux");
    Said { succeeded: output.status.success(), text: String::from_utf8_lossy(&output.stdout).trim().to_owned() }
}

/// The same, for what has to succeed.
fn sh(script: &str) -> String {
    let said = run(script);
    assert!(said.succeeded, "{script}:\n{}\n{}", said.text, run("journalctl --no-pager -n 40").text);
    said.text
}

fn property(unit: &str, name: &str) -> String {
    sh(&format!("systemctl show --property {name} --value {unit}"))
}

fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(
            Instant::now() < deadline,
            "after {PATIENCE:?} still not: {what}\n{}",
            run("journalctl --no-pager -n 60").text
        );
        thread::sleep(Duration::from_millis(200));
    }
}

#[test]
#[ignore = "scripts/check/deb boots a machine for it"]
fn the_package_works_beside_debians_prometheus() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let fleet = demo_fleet();
    let online = fleet.iter().filter(|device| device["is_connected_to_vpn"] == true).count();
    assert!(online > 5, "the fleet of the demo");
    let cloud = Arc::new(Cloud::start(fleet));
    let exporters = Exporters::start(&cloud);

    installs_without_a_key();
    starts_with_a_key(&cloud, &exporters.vpn.url());
    keeps_the_key_to_itself();
    is_scraped_by_debians_prometheus(online);
    reloads(&cloud);
    is_restarted_by_the_watchdog();
    does_not_start_with_a_mistake();
    starts_in_a_lan();
    is_confined();
    is_upgraded();
    is_purged();
}

fn installs_without_a_key() {
    let said = sh("dpkg --install /packages/first.deb");
    assert!(said.contains("baletheus does not start without an API key"), "{said}");
    for unit in UNITS {
        assert_eq!(property(unit, "ActiveState"), "inactive");
        assert_eq!(property(unit, "UnitFileState"), "enabled");
        let started = run(&format!("systemctl start {unit}"));
        assert!(!started.succeeded && started.text.contains("Assertion failed"), "{}", started.text);
        let status = run(&format!("systemctl status {unit}")).text;
        assert!(status.contains("AssertFileNotEmpty=/etc/baletheus/api-key was not met"), "{status}");
    }
    // The file of settings shows what the units set.
    let settings = sh("cat /etc/default/baletheus");
    for unit in UNITS {
        for set in property(unit, "Environment").split(' ').filter(|set| !set.starts_with("API_KEY_FILE=")) {
            assert!(settings.contains(&format!("\n#{set}\n")), "{set}: {settings}");
        }
    }
    // The programs are there for people too.
    assert!(sh("baletheus --version").starts_with("baletheus "));
    sh("test -s /usr/share/man/man1/baletheus-tunnel.1.gz -a -s /usr/share/bash-completion/completions/baletheus");
}

fn starts_with_a_key(cloud: &Cloud, vpn: &str) {
    sh(&format!("install -d /etc/baletheus && umask 077 && echo '{KEY}' >/etc/baletheus/api-key"));
    sh(&format!(
        "printf '%s\\n' BALENA_API_URL={} TUNNEL_URL={vpn} EXPORTERS=node:80 REFRESH_RATE=2s >>/etc/default/baletheus",
        cloud.url()
    ));
    sh("systemctl start baletheus baletheus-tunnel");
    for unit in UNITS {
        assert_eq!(property(unit, "ActiveState"), "active");
    }
    wait_for("the first refresh", || {
        (property("baletheus", "StatusText") == "the last refresh succeeded").then_some(())
    });
    assert_eq!(sh(&format!("stat --format '%U %a' {TARGETS}")), "baletheus 644");
    let targets: Value = serde_json::from_str(&sh(&format!("runuser -u prometheus -- cat {TARGETS}"))).expect("JSON");
    assert!(targets.as_array().is_some_and(|groups| !groups.is_empty()));
    // The metrics of the process need a part of /proc.
    let metrics = sh("curl -sS http://127.0.0.1:9797/metrics");
    for name in ["process_resident_memory_bytes", "process_start_time_seconds"] {
        let sample = metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
        assert!(sample.is_some_and(|value| value > 1e6), "{name}: {metrics}");
    }
}

fn keeps_the_key_to_itself() {
    for unit in UNITS {
        let id = property(unit, "MainPID");
        let seen = sh(&format!("cat /proc/{id}/environ /proc/{id}/cmdline | tr '\\0' '\\n'"));
        assert!(seen.contains("API_KEY_FILE=/run/credentials/"), "{seen}");
        assert!(!seen.contains(KEY), "{seen}");
        assert_eq!(sh(&format!("stat --format %U /proc/{id}")), "baletheus");
    }
    let other = run("runuser -u prometheus -- cat /run/credentials/baletheus.service/api-key");
    assert!(!other.succeeded, "another user reads the key");
    let journal = sh("journalctl --no-pager");
    assert!(!journal.contains(KEY), "the key is in the journal");
}

fn is_scraped_by_debians_prometheus(online: usize) {
    let job = "scrape_configs:\n  - job_name: balena\n    scrape_interval: 2s\n    proxy_url: http://127.0.0.1:9798\n    \
        file_sd_configs:\n      - files: [/var/lib/baletheus/balena.json]\n";
    sh(&format!("printf '%s' '{job}' >/etc/prometheus/prometheus.yml && systemctl restart prometheus"));
    let client = Client::builder().no_proxy().timeout(Duration::from_secs(10)).build().unwrap();
    let up = || -> Option<usize> {
        let url = "http://127.0.0.1:9090/api/v1/query?query=count(count%20by%20(uuid)(node_load1))";
        let answer: Value = serde_json::from_str(&client.get(url).send().ok()?.text().ok()?).ok()?;
        answer["data"]["result"][0]["value"][1].as_str()?.parse().ok()
    };
    // One device that is online has a tag that switches scraping off, and one has another exporter.
    let scraped = wait_for("Prometheus scrapes the devices", || up().filter(|count| *count + 3 > online));
    println!("Debian's prometheus scrapes {scraped} devices, of which {online} are online");
}

fn reloads(cloud: &Cloud) {
    sh("sed -i s/^REFRESH_RATE=2s/REFRESH_RATE=1h/ /etc/default/baletheus && systemctl restart baletheus");
    wait_for("a refresh after the restart", || (!property("baletheus", "StatusText").is_empty()).then_some(()));
    let (id, before) = (property("baletheus", "MainPID"), cloud.requests().len());
    sh("systemctl reload baletheus");
    wait_for("a refresh after the reload", || (cloud.requests().len() > before).then_some(()));
    wait_for("the end of the reload", || (property("baletheus", "ActiveState") == "active").then_some(()));
    assert_eq!(property("baletheus", "MainPID"), id);
}

/// The real time is minutes. A process that is stopped stands for one that hangs.
fn is_restarted_by_the_watchdog() {
    for unit in UNITS {
        let folder = format!("/run/systemd/system/{unit}.service.d");
        let settings = "[Service]\\nWatchdogSec=2s\\nTimeoutAbortSec=1s\\nRestartSec=1s\\n";
        sh(&format!("mkdir -p {folder} && printf '{settings}' >{folder}/quick.conf && systemctl daemon-reload"));
        sh(&format!("systemctl restart {unit}"));
        let id = property(unit, "MainPID");
        // More than twice the time of the watchdog: it is fed, though discovery sleeps for an hour.
        thread::sleep(Duration::from_secs(5));
        assert_eq!(property(unit, "MainPID"), id, "the watchdog killed a program that works");
        sh(&format!("kill -STOP {id}"));
        wait_for("the watchdog restarts it", || (property(unit, "NRestarts") == "1").then_some(()));
        wait_for("it is active again", || (property(unit, "ActiveState") == "active").then_some(()));
        assert_ne!(property(unit, "MainPID"), id);
        sh(&format!("rm -r {folder} && systemctl daemon-reload && systemctl restart {unit}"));
    }
}

fn does_not_start_with_a_mistake() {
    sh("echo TARGET_ADDRESS=moon >>/etc/default/baletheus");
    let started = run("systemctl restart baletheus");
    assert!(!started.succeeded, "it starts with a mistake in its settings: {}", started.text);
    assert_eq!(property("baletheus", "ActiveState"), "failed");
    assert_eq!(property("baletheus", "ExecMainStatus"), "2");
    let journal = sh("journalctl --no-pager --unit baletheus -n 20");
    assert!(journal.contains("TARGET_ADDRESS is \"moon\""), "{journal}");
    sh("sed -i /moon/d /etc/default/baletheus && systemctl restart baletheus");
}

fn starts_in_a_lan() {
    sh("echo TARGET_ADDRESS=lan >>/etc/default/baletheus && systemctl restart baletheus");
    wait_for("targets in the LAN", || run(&format!("grep -q 192.168 {TARGETS}")).succeeded.then_some(()));
    sh("sed -i /lan/d /etc/default/baletheus && systemctl restart baletheus");
}

fn is_confined() {
    for unit in UNITS {
        let report = sh(&format!("systemd-analyze security --no-pager {unit}.service"));
        let line = report.lines().last().unwrap_or_default().to_owned();
        println!("{unit}: {line}");
        let level = line.split_whitespace().find_map(|word| word.parse::<f64>().ok()).expect("a figure");
        assert!(level < 1.5, "{report}");
    }
}

fn is_upgraded() {
    let (targets, ids) = (sh(&format!("cat {TARGETS}")), UNITS.map(|unit| property(unit, "MainPID")));
    sh("dpkg --install /packages/second.deb </dev/null");
    for (unit, id) in UNITS.iter().zip(ids) {
        assert_eq!(property(unit, "ActiveState"), "active");
        assert_ne!(property(unit, "MainPID"), id, "{unit} still runs the old program");
    }
    assert_eq!(sh(&format!("cat {TARGETS}")), targets);
    assert!(sh("cat /etc/default/baletheus").contains("EXPORTERS=node:80"), "the settings of the user");
    sh("systemctl stop baletheus baletheus-tunnel");
    for unit in UNITS {
        assert_eq!(property(unit, "ActiveState"), "inactive");
        assert_eq!(property(unit, "Result"), "success");
    }
    sh(&format!("test -s {TARGETS} && systemctl start baletheus baletheus-tunnel"));
}

fn is_purged() {
    sh("dpkg --remove baletheus");
    assert!(!run("grep -lx baletheus /proc/[0-9]*/comm").succeeded, "a program still runs");
    sh("test -s /etc/baletheus/api-key -a -s /etc/default/baletheus");
    sh("dpkg --purge baletheus");
    let left = sh("find / -xdev -path /proc -prune -o -name '*baletheus*' -print | grep -v '^/run/\\|^/sys/' || true");
    let left: Vec<_> =
        left.lines().filter(|path| !path.starts_with("/var/log/") && !path.starts_with("/packages")).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}
