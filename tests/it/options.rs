//! Every row of the option table, every error and every exit code, on the real binary beside a simulated balenaCloud.

mod command_line;
mod effects;
mod key;
mod mistakes;
pub mod running;

use crate::support::binary::{self, sidecar};
use crate::support::cloud::{Cloud, KEY, Reply, Seen, Step};
use crate::support::sidecar::{PATIENCE, Running, Sidecar};
use baletheus::config::{OPTIONS, Verb};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Nobody listens here.
const NOWHERE: &str = "http://127.0.0.1:1";

/// The table of options, written down a second time: flag, variables, default.
const TABLE: &[(&str, &[&str], &str)] = &[
    ("", &["API_KEY"], ""),
    ("api-key-file", &["API_KEY_FILE"], ""),
    ("api-url", &["API_URL", "BALENA_API_URL"], "https://api.balena-cloud.com"),
    ("ca-file", &["CA_FILE", "BALENA_CA_FILE"], ""),
    ("fleet", &["FLEET", "APPLICATION"], ""),
    ("tag", &["DEVICE_TAG"], ""),
    ("online-only", &["ONLINE_ONLY"], "false"),
    ("address", &["TARGET_ADDRESS"], "vpn"),
    ("", &["USE_PUBLIC_URLS"], "false"),
    ("exporter", &["EXPORTERS"], "80"),
    ("service-labels", &["SERVICE_LABELS"], "true"),
    ("own-tags", &["OWN_TAGS"], "narrow"),
    ("public-domain", &["PUBLIC_URL_DOMAIN"], "balena-devices.com"),
    ("lan-network", &["LAN_NETWORKS"], "10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,100.64.0.0/10,fc00::/7"),
    ("labels", &["LABELS"], "all"),
    ("sd-file", &["SD_FILE_PATH"], "balena.json"),
    ("sd-file-mode", &["SD_FILE_MODE"], "0644"),
    ("refresh", &["REFRESH_RATE"], "30s"),
    ("timeout", &["API_TIMEOUT"], "60s"),
    ("write-empty", &["WRITE_EMPTY"], "false"),
    ("oneshot", &["ONESHOT"], "false"),
    ("dry-run", &["DRY_RUN"], "false"),
    ("log-level", &["LOG_LEVEL"], "info"),
    ("", &["RUST_LOG"], ""),
    ("log-format", &["LOG_FORMAT"], "text"),
    ("listen", &["LISTEN_ADDRESS"], ""),
    ("status-host", &["STATUS_HOSTS"], ""),
    ("status-token-file", &["STATUS_TOKEN_FILE"], ""),
    ("device-refresh", &["DEVICE_REFRESH_RATE"], "60s"),
    ("device-services", &["DEVICE_SERVICES"], "true"),
    ("device-metrics", &["DEVICE_METRICS"], "false"),
    ("tunnel-url", &["TUNNEL_URL"], "https://tunnel.balena-cloud.com"),
    ("listen", &["TUNNEL_LISTEN_ADDRESS"], "127.0.0.1:9798"),
];

/// Two fleets of one name, and a third; tags on both sides; one device offline, one without an address.
fn devices() -> Vec<Value> {
    let fleet = |id: u64, slug: &str, tags: Value| {
        let (organization, name) = slug.split_once('/').expect("a slug");
        let organization = json!([{ "handle": organization }]);
        json!([{ "id": id, "app_name": name, "slug": slug, "organization": organization, "application_tag": tags }])
    };
    let gateways = fleet(11, "acme/gateways", json!([{ "tag_key": "env", "value": "prod" }]));
    let others = fleet(12, "other/gateways", json!([]));
    let presses = fleet(13, "acme/presses", json!([]));
    let device = |id: u64, name: &str, fleet: &Value, tags: &[(&str, &str)], seen: (bool, bool, Option<&str>)| {
        let tags: Vec<_> = tags.iter().map(|(key, value)| json!({ "tag_key": key, "value": value })).collect();
        json!({
            "id": id, "uuid": id.to_string().repeat(32), "device_name": name,
            "is_connected_to_vpn": seen.0, "is_web_accessible": seen.1, "ip_address": seen.2,
            "os_version": "balenaOS 6.1.24", "os_variant": "prod", "supervisor_version": "16.7.6",
            "is_of__device_type": [{ "slug": "raspberrypi4-64" }], "belongs_to__application": fleet,
            "is_running__release": [{ "commit": "196dbe80abd111a95182bbc3588ec7c9", "raw_version": "1.2.3" }],
            "device_tag": tags,
        })
    };
    let of_press = [("env", "prod"), ("site", "lyon"), ("note", "a,b=c")];
    let of_drill = [("site", "paris"), ("a=b", "c=d"), ("c\\", ""), ("d\\e", "")];
    vec![
        device(1, "gate", &gateways, &[], (true, true, Some("192.168.0.10 fd00::1"))),
        device(2, "lab", &gateways, &[("env", "test"), ("site", "lyon")], (false, false, Some("fd12:3456::2"))),
        device(3, "press", &others, &of_press, (true, false, None)),
        device(4, "drill", &presses, &of_drill, (true, true, Some("127.0.0.1 10.0.0.4"))),
    ]
}

fn cloud() -> Cloud {
    Cloud::start(devices())
}

/// A cloud that answers nothing but this status.
fn broken(status: u16) -> Cloud {
    let cloud = cloud();
    cloud.intercept(move |_, _| Some(Reply::status(status, &[], b"")));
    cloud
}

/// `NAME=value` is a variable, anything else an argument, as in a shell.
fn variable(word: &str) -> Option<(&str, &str)> {
    word.split_once('=').filter(|(name, _)| name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'))
}

fn add(command: &mut Command, words: &[&str]) {
    for word in words {
        match variable(word) {
            Some((name, value)) => command.env(name, value),
            None => command.arg(word),
        };
    }
}

/// What a run left behind.
struct Run {
    code: Option<i32>,
    out: String,
    err: String,
}

/// Runs to the end. No run of this file may show the key.
fn finish(command: Command) -> Run {
    let shown = format!("{command:?}");
    let Output { status, stdout, stderr } = crate::support::sidecar::finish(command);
    let (out, err) = (String::from_utf8(stdout).expect("UTF-8"), String::from_utf8(stderr).expect("UTF-8"));
    assert!(!out.contains(KEY) && !err.contains(KEY), "the key is shown by {shown}\n{out}\n{err}");
    Run { code: status.code(), out, err }
}

fn run(sidecar: &Sidecar, words: &[&str]) -> Run {
    let mut command = sidecar.command();
    add(&mut command, words);
    finish(command)
}

fn dry(cloud: &Cloud, words: &[&str]) -> Run {
    let run = run(&sidecar(cloud), &[words, &["--dry-run"]].concat());
    assert_eq!(run.code, Some(0), "{words:?}\n{}", run.err);
    run
}

/// Starts the loop.
fn start(cloud: &Cloud, words: &[&str]) -> (Sidecar, Running) {
    let sidecar = words.iter().fold(sidecar(cloud), |sidecar, word| match variable(word) {
        Some((name, value)) => sidecar.env(name, value),
        None => sidecar.args([*word]),
    });
    let running = sidecar.start();
    (sidecar, running)
}

/// Ends it by a signal. How soon that has to be: tests/signals.rs.
fn stop(running: Running, signal: &str) -> Run {
    running.signal(signal);
    let (status, log) = running.wait();
    let err = log.join("\n");
    assert!(!err.contains(KEY), "the key is shown:\n{err}");
    Run { code: status.code(), out: String::new(), err }
}

impl Run {
    fn groups(&self) -> Vec<Value> {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}\n{}", self.out, self.err))
    }

    /// Names of the listed devices, in the list's order.
    fn names(&self) -> String {
        let name = |group: &Value| {
            let labels = &group["labels"];
            let name = labels["device_name"].as_str().or(labels["__meta_balena_device_name"].as_str());
            name.expect("a name").to_owned()
        };
        let mut names: Vec<_> = self.groups().iter().map(name).collect();
        names.dedup();
        names.join(" ")
    }

    /// The listed addresses, with each 32 digit uuid as one digit.
    fn targets(&self) -> String {
        let targets: Vec<_> =
            self.groups().iter().map(|group| group["targets"][0].as_str().unwrap().to_owned()).collect();
        (1..10).fold(targets.join(" "), |text, digit| text.replace(&digit.to_string().repeat(32), &digit.to_string()))
    }

    /// A label of each group, where it has it.
    fn label(&self, name: &str) -> String {
        let groups = self.groups();
        groups.iter().filter_map(|group| group["labels"][name].as_str()).collect::<Vec<_>>().join(" ")
    }

    /// Labels of the first group that stay on its series.
    fn plain_labels(&self) -> String {
        let first = &self.groups()[0]["labels"];
        let names: BTreeSet<&str> = first.as_object().expect("labels").keys().map(String::as_str).collect();
        names.into_iter().filter(|name| !name.starts_with("__")).collect::<Vec<_>>().join(" ")
    }

    fn warnings(&self) -> Vec<&str> {
        self.err.lines().filter(|line| line.contains(" WARN ")).collect()
    }
}

fn mode_of(sidecar: &Sidecar, name: &str) -> u32 {
    fs::metadata(sidecar.path(name)).expect("the file").permissions().mode() & 0o7777
}

/// All below its folder.
fn files(sidecar: &Sidecar) -> BTreeSet<String> {
    let entries = fs::read_dir(sidecar.path("")).expect("its folder");
    entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect()
}

const FILES: &[(&str, &[u8])] = &[
    ("empty", b""),
    ("blank", b" \n"),
    ("two-lines", b"first-line\nsecond-line\n"),
    ("accent", "cl\u{e9}-of-mine".as_bytes()),
    ("latin1", b"cl\xe9-of-mine"),
    ("quoted", b"\"of-mine\"\n"),
    ("utf-16", b"\xff\xfeo\0f\0-\0m\0i\0n\0e\0"),
    ("utf-16be", b"\xfe\xff\0o\0f\0-\0m\0i\0n\0e"),
    ("long", &[b'k'; 5000]),
    ("env", b"API_KEY=of-mine\n"),
    ("short", b"of-mine"),
    ("text.pem", b"no certificate"),
    ("half.pem", b"-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n"),
    ("key.pem", SERVER_KEY.as_bytes()),
    ("at@home.pem", b"no certificate"),
];

/// Runs what must be refused at once, and gives a line for each error.
fn refused(cloud: &Cloud, words: &[&str]) -> Vec<String> {
    refused_with(cloud, words, |_| {})
}

fn refused_with(cloud: &Cloud, words: &[&str], edit: impl FnOnce(&mut Command)) -> Vec<String> {
    let sidecar = sidecar(cloud);
    for (name, content) in FILES {
        fs::write(sidecar.path(name), content).unwrap();
    }
    fs::create_dir(sidecar.path("folder")).unwrap();
    let before = files(&sidecar);
    let mut command = sidecar.command();
    add(&mut command, words);
    edit(&mut command);
    let run = finish(command);
    // A file may be on a mount that comes later, and a name may resolve then. What another start cannot mend is 2.
    let may_pass = |line: &str| {
        let is_path = line.contains('/') || line.to_lowercase().replace('-', "_").contains("ca_file");
        line.contains("cannot be resolved") || (is_path && line.contains("the file cannot be read: No such file"))
    };
    let mut errors = run.err.lines().filter(|line| line.starts_with("  "));
    let code = if errors.all(may_pass) { 1 } else { 2 };
    assert_eq!((run.code, &*run.out), (Some(code), ""), "{words:?}\n{}", run.err);
    assert_eq!(files(&sidecar), before, "{words:?}");
    assert_eq!(cloud.requests().len(), 0, "{words:?}");
    let errors = run.err.lines().filter_map(|line| line.strip_prefix("  ")).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(run.err.lines().count(), errors.len() + 2, "{words:?}\n{}", run.err);
    let help = if words.contains(&"tunnel") { "\nbaletheus tunnel --help lists" } else { "\nbaletheus --help lists" };
    assert!(run.err.contains("error") && run.err.contains(help), "{}", run.err);
    errors
}

// Made for these tests by openssl, for 127.0.0.1, valid from 2020 to 2119; the key of the CA was thrown away.
const CA: &str = "-----BEGIN CERTIFICATE-----
MIIBNjCB3qADAgECAgEBMAoGCCqGSM49BAMCMBIxEDAOBgNVBAMMB3Rlc3QgQ0Ew
IBcNMjAwMTAxMDAwMDAwWhgPMjExOTEyMzEwMDAwMDBaMBIxEDAOBgNVBAMMB3Rl
c3QgQ0EwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAToPanMgnRKR3GnsaRuK8Tx
xfGrOy8aDU1q7Qug3zwwlXmYMwKR2UehQEQ0HEjaK1oNGhoNR2x68WHR7Vb7PbB1
oyMwITAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwICBDAKBggqhkjOPQQD
AgNHADBEAiAH35O6mD3aKXv73QHXPiYUV0RiQq9LaOdK9HNX64LucwIgXbcEyvdi
eT7WpgDuX+bMIS5/sKoAMUTRP/AlyIE0KLs=
-----END CERTIFICATE-----
";
const SERVER: &str = "-----BEGIN CERTIFICATE-----
MIIBPTCB5aADAgECAgECMAoGCCqGSM49BAMCMBIxEDAOBgNVBAMMB3Rlc3QgQ0Ew
IBcNMjAwMTAxMDAwMDAwWhgPMjExOTEyMzEwMDAwMDBaMBQxEjAQBgNVBAMMCWxv
Y2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABHpNrQ/W1P3oCO2Ek2gY
+fyskaBauXjVjNB+BE/65aO9hDMoT79fnGFx2o5kqnQ5TFBg832ga3qlOqj04vNO
7hajKDAmMA8GA1UdEQQIMAaHBH8AAAEwEwYDVR0lBAwwCgYIKwYBBQUHAwEwCgYI
KoZIzj0EAwIDRwAwRAIge0Dn0y+2LCfvegOq6ChKdJt9c1nBxRXDPnrAH6FZeMoC
IHPZlctpEv8T+3lRCZZXKFagu3in55Ioxyuugu+vJrY9
-----END CERTIFICATE-----
";
const SERVER_KEY: &str = "-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgLshJywhZXVL1DGrT
MAGR+h/GvXteYIBq1da3Bt+ednKhRANCAAR6Ta0P1tT96AjthJNoGPn8rJGgWrl4
1YzQfgRP+uWjvYQzKE+/X5xhcdqOZKp0OUxQYPN9oGt6pTqo9OLzTu4W
-----END PRIVATE KEY-----
";
