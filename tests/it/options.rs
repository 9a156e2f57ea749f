//! Every row of the option table, every error and every exit code, on the real binary beside a simulated balenaCloud.

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

/// Flag, variable, a value, another value, what else is given, and whether a run shows that the first value holds.
type Row =
    (&'static str, &'static str, &'static str, &'static str, &'static [&'static str], fn(&Run, &Sidecar) -> bool);

const DRY: &[&str] = &["--dry-run"];

#[rustfmt::skip] // a table
const ROWS: &[Row] = &[
    ("fleet", "FLEET", "acme/presses", "other/gateways", DRY, |run, _| run.names() == "drill"),
    ("fleet", "APPLICATION", "acme/presses", "other/gateways", DRY, |run, _| run.names() == "drill"),
    ("tag", "DEVICE_TAG", "env=test", "env=prod", DRY, |run, _| run.names() == "lab"),
    ("online-only", "ONLINE_ONLY", "true", "false", DRY, |run, _| run.names() == "gate press drill"),
    ("address", "TARGET_ADDRESS", "lan", "public", DRY, |run, _| run.targets().starts_with("192.168.0.10:80 ")),
    ("exporter", "EXPORTERS", "node:9100", "9100", DRY, |run, _| run.label("job") == "node node node node"),
    ("public-domain", "PUBLIC_URL_DOMAIN", "example.org", "example.net", &["--dry-run", "--address=public"],
        |run, _| run.targets() == "1.example.org:443 4.example.org:443"),
    ("lan-network", "LAN_NETWORKS", "10.0.0.0/24", "192.168.0.0/24,fd12:3456::/32", &["--dry-run", "--address=lan"],
        |run, _| run.targets() == "10.0.0.4:80"),
    ("labels", "LABELS", "none", "os_version", DRY, |run, _| run.plain_labels() == "uuid"),
    ("sd-file", "SD_FILE_PATH", "here.json", "there.json", &["--oneshot"],
        |run, sidecar| files(sidecar).contains("here.json") && run.err.contains("updated here.json")),
    ("sd-file-mode", "SD_FILE_MODE", "0640", "0600", &["--oneshot"],
        |_, sidecar| mode_of(sidecar, "balena.json") == 0o640),
    ("dry-run", "DRY_RUN", "true", "false", &["--oneshot"],
        |run, sidecar| run.out.starts_with('[') && !files(sidecar).contains("balena.json")),
    ("log-level", "LOG_LEVEL", "error", "debug", DRY, |run, _| run.err.is_empty()),
    ("log-format", "LOG_FORMAT", "json", "text", DRY,
        |run, _| run.err.lines().all(|line| serde_json::from_str::<Value>(line).is_ok_and(|line| line.is_object()))),
];

/// Flags whose tests need more than a run that ends by itself.
const ELSEWHERE: &[&str] = &[
    "api-key-file",
    "api-url",
    "ca-file",
    "refresh",
    "timeout",
    "write-empty",
    "oneshot",
    // status.rs
    "listen",
    "device-refresh",
    "device-services",
    "device-metrics",
    // services.rs
    "service-labels",
    // status_security.rs
    "status-host",
    "status-token-file",
    // own_tags.rs
    "own-tags",
    // check.rs
    "tunnel-url",
];

#[test]
fn an_option_is_a_flag_and_a_variable_and_the_flag_wins() {
    let cloud = cloud();
    for (flag, var, value, other, with, holds) in ROWS {
        let (set, set_other) = (format!("{var}={value}"), format!("{var}={other}"));
        let (given, given_other) = (format!("--{flag}={value}"), format!("--{flag}={other}"));
        let tries: &[(&[&str], bool)] = &[
            (&[&set], true),
            (&[&given], true),
            (&[&set_other, &given], true),
            (&[&format!("{var}= {value}\t\r\n")], true),
            (&[&format!("--{flag}=\u{a0}{value} \r")], true),
            (&[], false),
            (&[&format!("{var}=")], false),
            (&[&set_other], false),
            (&[&set, &given_other], false),
        ];
        for (words, expected) in tries {
            let sidecar = sidecar(&cloud);
            let run = run(&sidecar, &[*words, with].concat());
            assert_eq!(run.code, Some(0), "{words:?}\n{}", run.err);
            assert_eq!(holds(&run, &sidecar), *expected, "{words:?} {with:?}\n{}\n{}", run.out, run.err);
        }
    }
    let tested: BTreeSet<_> = ROWS.iter().map(|row| row.0).chain(ELSEWHERE.iter().copied()).collect();
    let all: BTreeSet<_> = TABLE.iter().map(|row| row.0).filter(|flag| !flag.is_empty()).collect();
    assert_eq!(tested, all);
}

#[test]
fn booleans_have_four_spellings_and_a_flag_may_stand_alone() {
    let cloud = cloud();
    let online = |words: &[&str]| match &*dry(&cloud, words).names() {
        "gate press drill" => true,
        "gate lab press drill" => false,
        other => panic!("{other}"),
    };
    for (spellings, expected) in
        [(["true", "1", "yes", "on", "TRUE", "Yes"], true), (["false", "0", "no", "off", "False", "OFF"], false)]
    {
        for spelling in spellings {
            assert_eq!(online(&[&format!("ONLINE_ONLY={spelling}")]), expected, "{spelling}");
            assert_eq!(online(&[&format!("--online-only={spelling}")]), expected, "{spelling}");
        }
    }
    assert!(online(&["--online-only"]));
    assert!(online(&["ONLINE_ONLY=false", "--online-only"]));
    // One that is on by default has a flag that switches it off.
    let labels = |words: &[&str]| {
        cloud.clear_requests();
        dry(&cloud, words);
        cloud.requests().iter().any(|seen| seen.target.contains("/release?"))
    };
    assert!(labels(&["SERVICE_LABELS=true"]) && labels(&["--no-service-labels", "--service-labels"]));
    for off in ["--no-service-labels", "--service-labels=false", "SERVICE_LABELS=false"] {
        assert!(!labels(&[off]), "{off}");
    }
    assert!(!labels(&["SERVICE_LABELS=true", "--no-service-labels"]));
}

#[test]
fn fleets_and_tags_choose_devices() {
    let cloud = cloud();
    #[rustfmt::skip] // a table
    let rows: &[(&[&str], &str)] = &[
        (&[], "gate lab press drill"),
        (&["FLEET=acme/gateways"], "gate lab"),
        (&["FLEET=12"], "press"),
        (&["FLEET=presses"], "drill"),
        (&["FLEET=gateways"], "gate lab press"),
        (&["FLEET=acme/presses, 12,"], "press drill"),
        (&["APPLICATION=presses,12"], "press drill"),
        (&["FLEET=presses", "APPLICATION=presses"], "drill"),
        (&["FLEET=presses\r", "APPLICATION=presses"], "drill"),
        (&["FLEET=", "APPLICATION=presses"], "drill"),
        (&["--fleet=acme/presses", "--fleet", "12"], "press drill"),
        (&["--fleet=acme/presses,12"], "press drill"),
        (&["APPLICATION=12", "--fleet=presses"], "drill"),
        (&["--tag=site"], "lab press drill"),
        (&["--tag", "site=lyon"], "lab press"),
        (&["--tag=env"], "gate lab press"), // the fleet's tags counted in
        (&["--tag=env=prod"], "gate press"), // lab says otherwise than its fleet
        (&["--tag=env=prod", "--tag=site=lyon"], "press"),
        (&["DEVICE_TAG=site=lyon"], "lab press"),
        (&["DEVICE_TAG=note=a,b=c"], "press"), // one tag, whatever its value holds
        (&[r"DEVICE_TAG=a\=b=c=d"], "drill"), // the key `a=b`
        (&[r"--tag=a\=b"], "drill"),
        (&[r"--tag=a\=b=c\=d"], ""),          // a value is taken as it is
        (&[r"--tag=c\\=", r"--tag=d\e"], "drill"), // the keys `c\` and `d\e`
        (&["FLEET=acme/gateways", "--tag=site"], "lab"),
    ];
    for (words, expected) in rows {
        assert_eq!(dry(&cloud, words).names(), *expected, "{words:?}");
    }
}

#[test]
fn addresses_and_exporters_make_targets() {
    let cloud = cloud();
    const VPN: &str = "1.balena:80 2.balena:80 3.balena:80 4.balena:80";
    const PUBLIC: &str = "1.balena-devices.com:443 4.balena-devices.com:443";
    #[rustfmt::skip] // a table
    let rows: &[(&[&str], &str)] = &[
        (&[], VPN),
        (&["--address=vpn"], VPN),
        (&["USE_PUBLIC_URLS=false"], VPN),
        (&["USE_PUBLIC_URLS="], VPN),
        (&["USE_PUBLIC_URLS=true"], PUBLIC),
        (&["USE_PUBLIC_URLS=true", "TARGET_ADDRESS=public"], PUBLIC),
        (&["--address", "public"], PUBLIC),
        (&["--address=public", "--public-domain=Devices.Example.org"], "1.devices.example.org:443 4.devices.example.org:443"),
        (&["TARGET_ADDRESS=lan"], "192.168.0.10:80 [fd12:3456::2]:80 10.0.0.4:80"),
        (&["TARGET_ADDRESS=lan", "USE_PUBLIC_URLS=no"], "192.168.0.10:80 [fd12:3456::2]:80 10.0.0.4:80"),
        (&["FLEET=12", "EXPORTERS=node:9100, app:8080/internal/metrics"], "3.balena:9100 3.balena:8080"),
        (&["FLEET=12", "--exporter=node:9100", "--exporter", "80"], "3.balena:9100 3.balena:80"),
        (&["FLEET=12", "EXPORTERS=7", "--exporter=node:9100,80"], "3.balena:9100 3.balena:80"),
        (&["FLEET=12", "EXPORTERS=a:80,b:80"], "3.balena:80 3.balena:80"),
    ];
    for (words, expected) in rows {
        assert_eq!(dry(&cloud, words).targets(), *expected, "{words:?}");
    }
    let run = dry(&cloud, &["FLEET=12", "EXPORTERS=node:9100,app:8080/internal/metrics,81"]);
    assert_eq!((run.label("job"), run.label("__metrics_path__")), ("node app".into(), "/internal/metrics".into()));
    // The public URL leads to port 80, but an exporter's path is kept.
    let run = dry(&cloud, &["FLEET=acme/presses", "--address=public", "--exporter=a:80/x,b:80/y"]);
    assert_eq!((run.label("__scheme__"), run.label("__metrics_path__")), ("https https".into(), "/x /y".into()));
}

#[test]
fn labels_that_are_not_chosen_are_there_for_relabelling() {
    const ALL: &str = "commit device_name device_type fleet os_variant os_version supervisor_version uuid";
    let cloud = cloud();
    #[rustfmt::skip] // a table
    let rows: &[(&[&str], &str)] = &[
        (&[], ALL),
        (&["LABELS=all"], ALL),
        (&["LABELS=none"], "uuid"),
        (&["LABELS=uuid"], "uuid"),
        (&["LABELS=device_name, fleet"], "device_name fleet uuid"),
        (&["--labels", "commit"], "commit uuid"),
    ];
    for (words, expected) in rows {
        let run = dry(&cloud, words);
        assert_eq!(run.plain_labels(), *expected, "{words:?}");
        let labels = &run.groups()[0]["labels"];
        for name in ALL.split(' ') {
            let chosen = expected.split(' ').any(|chosen| chosen == name);
            assert_eq!(labels[format!("__meta_balena_{name}")].is_null(), chosen, "{words:?} {name}");
        }
    }
}

#[test]
fn the_target_file_has_its_folder_made_and_its_mode_whatever_the_umask() {
    let cloud = cloud();
    for (umask, words, expected) in [
        ("077", &[][..], 0o644),
        ("000", &[], 0o644),
        ("077", &["SD_FILE_MODE=0666"], 0o666),
        ("022", &["--sd-file-mode", "640"], 0o640),
        ("000", &["--sd-file-mode=0o600"], 0o600),
    ] {
        let sidecar = sidecar(&cloud);
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "umask \"$0\"; exec \"$@\"", umask]).arg(binary::path());
        command.args(["--oneshot", "--sd-file=a/b/list.json"]);
        command.env_clear().envs(sidecar.command().get_envs().filter_map(|(name, value)| Some((name, value?))));
        add(command.current_dir(&sidecar.dir), words);
        let run = finish(command);
        assert_eq!(run.code, Some(0), "{}", run.err);
        assert_eq!(mode_of(&sidecar, "a/b/list.json"), expected, "umask {umask} {words:?}");
        // a folder that Prometheus may not enter would be no better than a file that it may not read
        assert!(umask != "000" || mode_of(&sidecar, "a/b") & 0o555 == 0o555);
    }
    // A mode that is changed later reaches a file whose list is the same.
    let sidecar = sidecar(&cloud);
    for mode in ["0600", "0644"] {
        run(&sidecar, &["--oneshot", "--sd-file-mode", mode]);
        assert_eq!(format!("{:04o}", mode_of(&sidecar, "balena.json")), mode);
    }
}

#[test]
fn no_targets_replace_some_only_where_that_is_allowed() {
    for allowed in [&["--write-empty"][..], &["WRITE_EMPTY=true"], &["WRITE_EMPTY=no", "--write-empty=yes"]] {
        let cloud = cloud();
        let sidecar = sidecar(&cloud);
        assert_eq!(run(&sidecar, &["--oneshot"]).code, Some(0));
        let list = sidecar.list();
        cloud.change(Vec::clear);
        for refused in [&[][..], &["WRITE_EMPTY="], &["WRITE_EMPTY=off"], &["WRITE_EMPTY=on", "--write-empty=off"]] {
            let run = run(&sidecar, &[refused, &["--oneshot"]].concat());
            assert_eq!(run.code, Some(1), "{}", run.err);
            assert!(run.err.contains("--write-empty") && run.err.contains("WRITE_EMPTY=true"), "{}", run.err);
            // What the key sees, and that the list stays.
            assert_eq!(run.warnings().len(), 2, "{}", run.err);
            assert_eq!(sidecar.list(), list);
        }
        assert_eq!(run(&sidecar, &[allowed, &["--oneshot"]].concat()).code, Some(0), "{allowed:?}");
        assert_eq!(sidecar.list(), "[]\n", "{allowed:?}");
    }
    // Where no file stands yet, no option is needed.
    let nothing = Cloud::start(Vec::new());
    let sidecar = sidecar(&nothing);
    assert_eq!(run(&sidecar, &["--oneshot"]).code, Some(0));
    assert_eq!(sidecar.list(), "[]\n");
    assert_eq!(dry(&nothing, &[]).out, "[]\n");
}

#[test]
fn a_dry_run_shows_the_file_of_a_oneshot_and_touches_none() {
    let cloud = cloud();
    for words in [&[][..], &["EXPORTERS=node:9100,app:80/metrics", "LABELS=none"], &["FLEET=none/such"]] {
        let written = sidecar(&cloud);
        assert_eq!(run(&written, &[words, &["--oneshot"]].concat()).code, Some(0));
        assert_eq!(dry(&cloud, words).out, written.list(), "{words:?}");
    }
    let sidecar = sidecar(&cloud);
    for words in [&["--dry-run", "--sd-file=new/folder/list.json"][..], &["DRY_RUN=1", "ONESHOT=1"]] {
        let run = run(&sidecar, words);
        assert_eq!((run.code, run.names()), (Some(0), "gate lab press drill".into()), "{}", run.err);
        assert_eq!(files(&sidecar), BTreeSet::new());
    }
    // A file that stands there is neither read nor replaced.
    fs::write(sidecar.path("balena.json"), "precious").unwrap();
    let before = fs::metadata(sidecar.path("balena.json")).unwrap();
    assert_eq!(run(&sidecar, &["--dry-run"]).code, Some(0));
    let after = fs::metadata(sidecar.path("balena.json")).unwrap();
    assert_eq!((before.ino(), before.mtime_nsec(), before.mode()), (after.ino(), after.mtime_nsec(), after.mode()));
    assert_eq!((sidecar.list(), files(&sidecar).len()), ("precious".into(), 1));
}

#[test]
fn the_start_line_tells_what_it_does_and_how_often() {
    let cloud = cloud();
    #[rustfmt::skip] // a table
    let rows: &[(&[&str], &str)] = &[
        (&["REFRESH_RATE="], "every 30s"),
        (&["REFRESH_RATE=2m"], "every 2m"),
        (&["REFRESH_RATE=30000"], "every 30s"), // as the first baletheus had it
        (&["REFRESH_RATE=1500"], "every 1s 500ms"),
        (&["--refresh", "45s"], "every 45s"), // over the 1s that every sidecar here has as a variable
        (&["--refresh=60000"], "every 1m"),
        (&["--refresh=1h 30m"], "every 1h 30m"),
        (&["ONESHOT=false"], "every 1s"),
        (&["ONESHOT="], "every 1s"),
    ];
    for (words, expected) in rows {
        let (_dir, running) = start(&cloud, words);
        running.wait_for("updated balena.json: 4 targets of 4 devices");
        let run = stop(running, "TERM");
        let first = run.err.lines().next().expect("a first line");
        assert!(first.ends_with(expected), "{words:?}: {first}");
        let facts = [env!("CARGO_PKG_VERSION"), &cloud.url(), "balena.json", "vpn"];
        assert!(facts.iter().all(|fact| first.contains(fact)), "{first}");
    }
}

#[test]
fn a_oneshot_ends_and_its_false_beats_a_true_variable() {
    let cloud = cloud();
    for words in [&["--oneshot"][..], &["ONESHOT=true"], &["ONESHOT=false", "--oneshot"]] {
        let sidecar = sidecar(&cloud);
        let run = run(&sidecar, words);
        assert_eq!(run.code, Some(0), "{words:?}\n{}", run.err);
        assert!(run.err.lines().next().unwrap().ends_with("once"), "{}", run.err);
        assert!(sidecar.list().starts_with('['));
    }
    cloud.clear_requests();
    let (_dir, running) = start(&cloud, &["ONESHOT=true", "--oneshot=false"]);
    cloud.wait_for_requests(4, PATIENCE); // whose key it is, and three refreshes
    assert_eq!(stop(running, "TERM").code, Some(0));
}

#[test]
fn a_timeout_is_for_the_whole_answer() {
    let hangs = || Reply::steps([Step::Hang]);
    let drips = || {
        let head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n".to_vec();
        let drop = [Step::Pause(Duration::from_millis(200)), Step::Send(b" ".to_vec())];
        Reply::steps([Step::Send(head)].into_iter().chain(drop.into_iter().cycle().take(400)))
    };
    for reply in [hangs as fn() -> Reply, drips] {
        for words in [&["API_TIMEOUT=1s"][..], &["--timeout", "1s"], &["API_TIMEOUT=1h", "--timeout=1s"]] {
            let cloud = cloud();
            cloud.intercept(move |seen, _| seen.target.starts_with("/v7/device").then(reply));
            let started = Instant::now();
            let run = run(&sidecar(&cloud), &[words, &["--oneshot"]].concat());
            let took = started.elapsed();
            assert_eq!(run.code, Some(1), "{words:?}\n{}", run.err);
            assert!(run.err.contains(&format!("no whole answer from {} within 1s", cloud.url())), "{}", run.err);
            // The bytes drip for 80 s.
            assert!((1000..79_000).contains(&took.as_millis()), "{words:?} {took:?}");
        }
    }
}

#[test]
fn the_log_has_a_level_and_a_form() {
    let cloud = cloud();
    let (info, own) = (" INFO ", " DEBUG all causes: ");
    // Where the API cannot be reached there is a line at each level but error.
    let rows: &[(&[&str], &[&str], &[&str])] = &[
        (&[], &[info, " WARN "], &[" DEBUG "]),
        (&["LOG_LEVEL=INFO"], &[info, " WARN "], &[" DEBUG "]),
        (&["LOG_LEVEL=warn"], &[" WARN "], &[info]),
        (&["--log-level=error"], &[], &[info, " WARN "]),
        (&["--log-level=off"], &[], &[info, " WARN "]),
        (&["LOG_LEVEL=debug"], &[info, own], &["reqwest", "hyper"]),
        (&["LOG_LEVEL=debug", "RUST_LOG="], &[info, own], &["reqwest", "hyper"]),
        // RUST_LOG beats it, in both directions and over the flag too
        (&["LOG_LEVEL=error", "RUST_LOG=info"], &[info, " WARN "], &[" DEBUG "]),
        (&["LOG_LEVEL=debug", "RUST_LOG=warn"], &[" WARN "], &[info, " DEBUG "]),
        // and says so where it hides warnings
        (&["RUST_LOG=error"], &["RUST_LOG=error hides this program's warnings"], &[info, " WARN "]),
        (&["RUST_LOG=off"], &["RUST_LOG=off hides"], &[info, " WARN "]),
        (&["RUST_LOG=reqwest=debug"], &["RUST_LOG=reqwest=debug hides"], &[info, " WARN "]),
        (&["RUST_LOG=debug"], &[info, own, "reqwest"], &["hides"]),
        (&["--log-level=error", "RUST_LOG=baletheus=debug"], &[info, own], &["reqwest"]),
    ];
    let mut wrong = Vec::new();
    for (words, there, absent) in rows {
        let run = run(&sidecar(&cloud), &[*words, &["--oneshot", "--api-url", NOWHERE]].concat());
        assert_eq!(run.code, Some(1));
        let is_right =
            there.iter().all(|text| run.err.contains(text)) && !absent.iter().any(|text| run.err.contains(text));
        if !is_right {
            wrong.push(format!("{words:?} wants {there:?} and not {absent:?}:\n{}", run.err));
        }
        for line in run.err.lines() {
            let time = line.split(' ').next().unwrap();
            assert!(humantime::parse_rfc3339(time).is_ok(), "no time stamp: {line}");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    // Text: one line a record, also of a device whose name holds line breaks; JSON: the same, as an object.
    cloud.change(|devices| devices[0]["device_name"] = "two\nlines \"and\" a tab\t".into());
    for form in ["text", "json"] {
        let run = run(&sidecar(&cloud), &["--oneshot", "--log-format", form, "LOG_FORMAT="]);
        assert_eq!(run.err.lines().count(), 6, "{}", run.err); // start, updated, four devices
        for line in run.err.lines().filter(|_| form == "json") {
            let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
            assert!(humantime::parse_rfc3339(line["time"].as_str().unwrap()).is_ok(), "{line}");
            assert_eq!(line["level"], "INFO");
            assert!(line["message"].is_string(), "{line}");
        }
    }
}

#[test]
fn no_level_shows_the_key() {
    let cloud = cloud();
    for words in [&["RUST_LOG=trace"][..], &["RUST_LOG=trace", "LOG_FORMAT=json"], &["LOG_LEVEL=trace"]] {
        assert_eq!(run(&sidecar(&cloud), &[words, &["--oneshot"]].concat()).code, Some(0)); // `finish` looks for it
    }
    // An answer that echoes the key, and a time-out, a refusal, a dead end.
    let echo = broken(403);
    echo.intercept(|_, _| Some(Reply::status(403, &[("Content-Type", "text/plain")], KEY.as_bytes())));
    assert_eq!(run(&sidecar(&echo), &["RUST_LOG=trace", "--oneshot"]).code, Some(1));
    assert_eq!(run(&sidecar(&broken(401)), &["RUST_LOG=trace", "--oneshot"]).code, Some(1));
    assert_eq!(run(&sidecar(&cloud), &["RUST_LOG=trace", "--oneshot", "--api-url", NOWHERE]).code, Some(1));
}

#[test]
fn a_key_in_the_wrong_place_is_refused_and_not_repeated() {
    let cloud = cloud();
    // balena's API takes a key in the query too, and who sets API_KEY_FILE may take it for API_KEY
    let query = format!("{}/?apikey={KEY}", cloud.url());
    for (words, named) in [
        (&[&*format!("BALENA_API_URL={query}")][..], "BALENA_API_URL"),
        (&["--api-url", &query], "--api-url"),
        (&["API_KEY=", &format!("API_KEY_FILE={KEY}")], "API_KEY_FILE"),
    ] {
        // `finish` sees that it is not shown
        let errors = refused(&cloud, words);
        assert!(errors.len() == 1 && errors[0].contains(named) && errors[0].contains("it takes"), "{errors:#?}");
    }
    let errors = refused(&cloud, &["BALENA_API_URL=https://me:pass-word@api.balena-cloud.com"]);
    assert!(
        errors.len() == 1 && errors[0].contains("BALENA_API_URL") && !errors[0].contains("pass-word"),
        "{errors:?}"
    );
}

#[test]
fn the_key_comes_from_a_variable_or_a_file() {
    let cloud = cloud();
    let bearer = format!("Bearer {KEY}");
    let sidecar = sidecar(&cloud);
    fs::write(sidecar.path("key"), format!("\n  {KEY}\r\n")).unwrap();
    fs::write(sidecar.path("bom"), format!("\u{feff}{KEY}\r\n")).unwrap();
    fs::write(sidecar.path("old"), "an-old-key").unwrap();
    for words in [
        &[&*format!("API_KEY= \t{KEY}\n")][..],
        &["API_KEY=", "API_KEY_FILE=key"],
        &["API_KEY=", "--api-key-file", "key"],
        &["API_KEY=", "API_KEY_FILE=bom"],
        &["API_KEY=", "API_KEY_FILE=old", "--api-key-file=key"],
        &["API_KEY_FILE="],
    ] {
        cloud.clear_requests();
        let run = run(&sidecar, &[words, &["--dry-run"]].concat());
        assert_eq!(run.code, Some(0), "{words:?}\n{}", run.err);
        let requests = cloud.requests();
        assert!(requests.iter().all(|seen| seen.header("authorization") == Some(&bearer)), "{requests:#?}");
    }
    assert_eq!(run(&sidecar, &["API_KEY=", "API_KEY_FILE=key", "--api-key-file=old", "--dry-run"]).code, Some(1));
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

/// Flag, variable, a value that it does not take, and words from what must be said of it beside the value.
type Mistake = (&'static str, &'static str, &'static str, &'static [&'static str]);

const BOOLEAN: &[&str] = &["true/false", "1/0", "yes/no", "on/off"];

#[rustfmt::skip] // a table
const MISTAKES: &[Mistake] = &[
    ("api-url", "BALENA_API_URL", "api.balena-cloud.com", &["https URL"]),
    ("api-url", "BALENA_API_URL", "ftp://api.balena-cloud.com", &["https URL"]),
    ("api-url", "BALENA_API_URL", "https://", &["https URL"]),
    ("api-url", "API_URL", "https://api.balena-cloud.com/v7/device", &["a path does not belong there; write https://api.balena-cloud.com;"]),
    ("ca-file", "CA_FILE", "missing.pem", &["cannot be read", "No such file", "PEM"]),
    ("ca-file", "BALENA_CA_FILE", "missing.pem", &["cannot be read", "No such file", "PEM"]),
    ("ca-file", "CA_FILE", "/dev/zero", &["larger than 16 MiB", "PEM"]),
    ("ca-file", "BALENA_CA_FILE", "folder", &["cannot be read", "directory", "PEM"]),
    ("ca-file", "BALENA_CA_FILE", "text.pem", &["PEM"]),
    ("ca-file", "BALENA_CA_FILE", "half.pem", &["PEM"]),
    ("ca-file", "BALENA_CA_FILE", "empty", &["no certificate"]),
    ("ca-file", "BALENA_CA_FILE", "key.pem", &["no certificate"]),
    ("ca-file", "BALENA_CA_FILE", "at@home.pem", &["PEM"]), // only a URL may hide what it got
    ("timeout", "API_TIMEOUT", "60", &["unit", "60s"]),
    ("timeout", "API_TIMEOUT", "10ms", &["1s", "1h"]),
    ("timeout", "API_TIMEOUT", "2h", &["1s", "1h"]),
    ("timeout", "API_TIMEOUT", "soon", &["1s", "1h"]),
    ("fleet", "FLEET", "acme/gateways/3", &["organization/name", "id", "name"]),
    ("fleet", "FLEET", "gateways,/acme", &["\"/acme\"", "organization/name"]),
    ("fleet", "APPLICATION", "acme/", &["organization/name"]),
    ("fleet", "FLEET", "99999999999999999999", &["id"]),
    ("tag", "DEVICE_TAG", "=prod", &["key=value"]),
    ("tag", "DEVICE_TAG", "my env=prod", &["\"my env\"", "white space"]),
    ("online-only", "ONLINE_ONLY", "maybe", BOOLEAN),
    ("address", "TARGET_ADDRESS", "wan", &["vpn, public or lan"]),
    ("", "USE_PUBLIC_URLS", "si", BOOLEAN),
    ("exporter", "EXPORTERS", "node", &["1 to 65535", "node:9100"]),
    ("exporter", "EXPORTERS", "80,node:0", &["\"node:0\"", "1 to 65535"]),
    ("exporter", "EXPORTERS", "65536", &["1 to 65535"]),
    ("exporter", "EXPORTERS", "+80", &["1 to 65535"]),
    ("exporter", "EXPORTERS", "my app:80", &["name", "a-z"]),
    ("exporter", "EXPORTERS", "80/metrics?x=y", &["has a query", "job its params", "__meta_balena_exporter"]),
    ("exporter", "EXPORTERS", "app:80?x=y", &["1 to 65535"]),
    ("exporter", "EXPORTERS", "80/metrics#x", &["not a plain path"]),
    ("exporter", "EXPORTERS", ",", &["no value"]),
    ("exporter", "EXPORTERS", "node:9100,Grafana:80", &["reserved", "another name"]),
    ("exporter", "EXPORTERS", "none,80", &["\"none\"", "1 to 65535"]),
    ("service-labels", "SERVICE_LABELS", "maybe", BOOLEAN),
    ("own-tags", "OWN_TAGS", "some", &["narrow", "all", "off"]),
    ("public-domain", "PUBLIC_URL_DOMAIN", "https://example.org", &["a domain name"]),
    ("public-domain", "PUBLIC_URL_DOMAIN", "example..org", &["a domain name"]),
    ("lan-network", "LAN_NETWORKS", "192.168.1.7/24", &["192.168.1.0/24", "comma-separated"]),
    ("labels", "LABELS", "uuid,hostname", &["no label", "device_name", "supervisor_version", "all", "none"]),
    ("sd-file", "SD_FILE_PATH", "folder", &["directory", "file"]),
    ("sd-file", "SD_FILE_PATH", "new/", &["directory", "file"]),
    ("sd-file-mode", "SD_FILE_MODE", "rw-r--r--", &["octal", "0400", "0777"]),
    ("sd-file-mode", "SD_FILE_MODE", "0688", &["octal"]),
    ("sd-file-mode", "SD_FILE_MODE", "0044", &["0400"]),
    ("sd-file-mode", "SD_FILE_MODE", "4755", &["0777"]),
    ("write-empty", "WRITE_EMPTY", "2", BOOLEAN),
    ("refresh", "REFRESH_RATE", "500", &["milliseconds", "unit", "30s"]),
    ("refresh", "REFRESH_RATE", "45", &["milliseconds", "unit", "45s"]),
    ("refresh", "REFRESH_RATE", "0", &["unit"]),
    ("refresh", "REFRESH_RATE", "500ms", &["1s"]),
    ("refresh", "REFRESH_RATE", "40d", &["30d"]),
    ("refresh", "REFRESH_RATE", "9999999999999999999999", &["30d"]),
    ("refresh", "REFRESH_RATE", "often", &["45s", "2m"]),
    ("oneshot", "ONESHOT", "once", BOOLEAN),
    ("dry-run", "DRY_RUN", "y", BOOLEAN),
    ("log-level", "LOG_LEVEL", "loud", &["off, error, warn, info, debug or trace"]),
    ("", "RUST_LOG", "baletheus=loud", &["baletheus=debug"]),
    ("log-format", "LOG_FORMAT", "xml", &["text", "json"]),
    ("listen", "LISTEN_ADDRESS", "9797", &["host:port", ":PORT"]),
    ("listen", "LISTEN_ADDRESS", ":http", &["host:port"]),
    ("listen", "LISTEN_ADDRESS", "127.0.0.1:99999", &["host:port"]),
    ("listen", "LISTEN_ADDRESS", "a-label-of-more-than-63-characters-which-no-name-in-the-dns-may-have.test:80", &["cannot be resolved"]),
    ("status-host", "STATUS_HOSTS", "http://status.example.org", &["status.example.org", "comma-separated"]),
    ("status-token-file", "STATUS_TOKEN_FILE", "/nonexistent/token", &["16 characters"]),
    ("device-refresh", "DEVICE_REFRESH_RATE", "500", &["milliseconds", "unit"]),
    ("device-services", "DEVICE_SERVICES", "some", BOOLEAN),
    ("device-metrics", "DEVICE_METRICS", "some", BOOLEAN),
    ("tunnel-url", "TUNNEL_URL", "tunnel.balena-cloud.com", &["whole URL"]),
    ("tunnel-url", "TUNNEL_URL", "http://vpn:3128/v7", &["a path does not belong there; write http://vpn:3128;"]),
    ("listen", TUNNEL_LISTEN, "9798", &["host:port", ":PORT"]),
];

/// Of `baletheus tunnel` alone.
const TUNNEL_LISTEN: &str = "TUNNEL_LISTEN_ADDRESS";

/// The subcommand that takes this variable, if it is not the main one.
fn command_of(var: &str) -> &'static [&'static str] {
    if var == TUNNEL_LISTEN { &["tunnel"] } else { &[] }
}

/// What parsers say to programmers, and what does not read as a sentence.
const JARGON: &[&str] = &["target type", "digit found in string", "without a base", "number at 0", ": is "];

#[test]
fn a_mistake_is_named_as_it_was_given_with_what_it_got_and_what_it_takes() {
    let cloud = cloud();
    let mut wrong = Vec::new();
    for (flag, var, value, said) in MISTAKES {
        for (name, word) in
            [(format!("--{flag}"), format!("--{flag}={value}")), ((*var).into(), format!("{var}={value}"))]
        {
            if name == "--" {
                continue;
            }
            let errors = refused(&cloud, &[command_of(var), &[&*word]].concat());
            let is_said = |error: &String| {
                error.starts_with(&format!("{name} is {value:?}"))
                    && error.contains("it takes")
                    && said.iter().all(|said| error.contains(said))
                    && !JARGON.iter().any(|word| error.contains(word))
            };
            if errors.len() != 1 || !is_said(&errors[0]) {
                wrong.push(format!("{word}: {errors:#?} must say {said:?}, and none of {JARGON:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Each option that can be wrong is above.
    let tested: BTreeSet<_> = MISTAKES.iter().map(|row| row.1).chain(["API_KEY", "API_KEY_FILE"]).collect();
    assert_eq!(tested, TABLE.iter().flat_map(|row| row.1).copied().collect());
}

/// Values without content. A shell script with an unset variable makes them, and `FLEET=" "` would select every device.
const NOTHING: &[&str] = &[" ", ",", "\r", " ,\t, ", "\u{a0}"];

#[test]
fn a_value_without_content_is_a_mistake_of_every_option() {
    let cloud = cloud();
    let mut wrong = Vec::new();
    for (flag, vars, _) in TABLE {
        let flags: &[String] = if flag.is_empty() { &[] } else { &[format!("--{flag}")] };
        let of_flag = flags.iter().flat_map(|name| NOTHING.iter().chain(&[""]).map(move |value| (name.clone(), value)));
        let of_vars = vars.iter().flat_map(|name| NOTHING.iter().map(move |value| ((*name).to_owned(), value)));
        for (name, value) in of_flag.chain(of_vars) {
            // Not one of the other names for the option takes its place.
            let good = if *flag == "fleet" && name != "FLEET" { "FLEET=acme/presses" } else { "LOG_LEVEL=info" };
            let good = if vars.contains(&"LOG_LEVEL") { "LOG_FORMAT=json" } else { good };
            let given = format!("{name}={value}");
            let words = [command_of(vars[0]), &[good, &given]].concat();
            let errors = refused_with(&cloud, &words, |command| {
                if *flag == "api-key-file" {
                    command.env_remove("API_KEY");
                }
            });
            let is_said = |error: &String| error.starts_with(&format!("{name} is {:?}: it has no value", value.trim()));
            let differs = format!("FLEET and {name} are set to different values");
            let is_differing = |error: &String| error.starts_with(&differs);
            if errors.len() != 1 || !errors.iter().all(|error| is_said(error) || is_differing(error)) {
                wrong.push(format!("{name}={value:?}: {errors:#?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // One empty flag among others, and a variable that another name for it does not mend.
    for words in [&["--fleet=acme/presses", "--fleet="][..], &["FLEET= ", "APPLICATION= "], &["--fleet", ""]] {
        assert_eq!(refused(&cloud, words).len(), 1, "{words:?}");
    }
}

#[test]
fn mistakes_of_more_than_one_option_name_all_of_them() {
    let cloud = cloud();
    #[rustfmt::skip] // a table
    let rows: &[(&[&str], &[&str])] = &[
        (&["USE_PUBLIC_URLS=true", "TARGET_ADDRESS=lan"], &["USE_PUBLIC_URLS", "TARGET_ADDRESS", "lan"]),
        (&["USE_PUBLIC_URLS=true", "TARGET_ADDRESS=vpn"], &["USE_PUBLIC_URLS", "TARGET_ADDRESS", "vpn"]),
        (&["USE_PUBLIC_URLS=true", "--address=lan"], &["USE_PUBLIC_URLS", "--address", "lan"]),
        (&["FLEET=a/b", "APPLICATION=c/d"], &["FLEET", "APPLICATION"]),
        (&["EXPORTERS=node:9100,app:80,node:9100"], &["EXPORTERS", "node:9100", "same target", "name"]),
        (&["--exporter=9100", "--exporter=9100/more"], &["--exporter", "9100/more", "same target", "name"]),
        // all public URLs of a device are one address
        (&["--address=public", "EXPORTERS=80,9100"], &["EXPORTERS", "80", "9100", "name"]),
        (&["USE_PUBLIC_URLS=1", "--exporter=80/a", "--exporter=80/b"], &["--exporter", "80/a", "80/b", "name"]),
        (&["--address=public", "EXPORTERS=node:80,node:9100"], &["EXPORTERS", "node:80", "node:9100", "name"]),
    ];
    let mut wrong = Vec::new();
    for (words, said) in rows {
        let errors = refused(&cloud, words);
        if errors.len() != 1 || !said.iter().all(|said| errors[0].contains(said)) {
            wrong.push(format!("{said:?} is not in {errors:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn more_fleets_than_a_url_can_hold_are_told_of() {
    let cloud = cloud();
    let fleets = |count| -> String { (1..=count).map(|id| format!("1000{id},")).collect() };
    let run = run(&sidecar(&cloud), &["--dry-run", "--fleet", &fleets(400)]);
    assert!(run.code == Some(1) && run.err.contains("431") && run.err.contains("name fewer"), "{}", run.err);
    assert_eq!(dry(&cloud, &["--fleet", &fleets(240)]).out, "[]\n");
}

#[test]
fn a_key_that_cannot_be_one_is_refused_without_being_shown() {
    let cloud = cloud();
    let split = format!("API_KEY={}\n{}", &KEY[..20], &KEY[20..]);
    #[rustfmt::skip] // a table
    let rows: &[(&[&str], &[&str])] = &[
        (&["API_KEY="], &["API_KEY is not set", "named API key", "API_KEY_FILE"]),
        (&["API_KEY=", "API_KEY_FILE="], &["API_KEY is not set"]),
        (&["API_KEY= \n"], &["API_KEY is \"\": it has no value"]),
        (&[&split], &["API_KEY", "line break", "after 20 characters"]),
        (&["API_KEY=two words"], &["API_KEY", "blank", "after 3 characters"]),
        (&["API_KEY=cl\u{e9}-of-mine"], &["API_KEY", "non-ASCII", "after 2 characters"]),
        (&["API_KEY_FILE=key.pem"], &["API_KEY and API_KEY_FILE", "one of them"]),
        (&["--api-key-file=key.pem"], &["API_KEY and --api-key-file", "one of them"]),
        (&["API_KEY=", "--api-key-file=run/missing"], &["--api-key-file is \"run/missing\"", "cannot be read", "No such file"]),
        (&["API_KEY=", "API_KEY_FILE=folder"], &["API_KEY_FILE is \"folder\"", "cannot be read", "directory"]),
        (&["API_KEY=", "API_KEY_FILE=empty"], &["API_KEY_FILE is \"empty\"", "is empty"]),
        (&["API_KEY=", "API_KEY_FILE=blank"], &["API_KEY_FILE is \"blank\"", "is empty"]),
        (&["API_KEY=", "--api-key-file=two-lines"], &["--api-key-file is \"two-lines\"", "line break", "after 10 characters"]),
        (&["API_KEY=", "API_KEY_FILE=accent"], &["API_KEY_FILE is \"accent\"", "non-ASCII", "after 2 characters"]),
        (&["API_KEY=\"of-mine\""], &["API_KEY has quotes around its value", "remove them"]),
        (&["API_KEY= 'of-mine' \n"], &["API_KEY has quotes around its value"]),
        (&["API_KEY=of-mine\""], &["API_KEY has a quote at its beginning or end", "remove it"]),
        (&["API_KEY=", "API_KEY_FILE=quoted"], &["API_KEY_FILE is \"quoted\": the file has a quote at its beginning or end"]),
        (&["API_KEY=", "API_KEY_FILE=latin1"], &["API_KEY_FILE is \"latin1\"", "non-ASCII", "after 2 characters"]),
        (&["API_KEY=", "API_KEY_FILE=utf-16"], &["API_KEY_FILE is \"utf-16\"", "is UTF-16: save it as UTF-8"]),
        (&["API_KEY=", "API_KEY_FILE=utf-16be"], &["API_KEY_FILE is \"utf-16be\"", "is UTF-16"]),
        (&["API_KEY=", "API_KEY_FILE=long"], &["API_KEY_FILE is \"long\"", "larger than 4 KiB"]),
        (&["API_KEY=", "API_KEY_FILE=env"], &["API_KEY_FILE is \"env\"", "begins with API_KEY=", "remove that"]),
        (&["API_KEY=BALENA_API_KEY=of-mine"], &["API_KEY begins with BALENA_API_KEY="]),
        (&["API_KEY=export API_KEY=of-mine"], &["API_KEY begins with export API_KEY=, which is no part of it"]),
        (&["API_KEY=balena_token: of-mine"], &["API_KEY begins with balena_token:"]),
        (&["API_KEY=Bearer of-mine"], &["API_KEY begins with Bearer, "]),
        (&["API_KEY=<of-mine>"], &["API_KEY holds a placeholder"]),
        (&["API_KEY=<your key of-mine>"], &["API_KEY holds a placeholder"]),
        (&["API_KEY=paste it here"], &["API_KEY holds a placeholder"]),
        (&["API_KEY=xxxxxxxxxxxxxxxx"], &["API_KEY holds a placeholder"]),
        (&["API_KEY=${OF_MINE}"], &["API_KEY holds a placeholder"]),
        (&["API_KEY=YOUR_API_KEY"], &["API_KEY holds a placeholder"]),
        (&["API_KEY=put-your-named-key-of-balena-cloud-here"], &["API_KEY holds a placeholder"]),
        (&["STATUS_TOKEN_FILE=short"], &["STATUS_TOKEN_FILE is \"short\"", "fewer than 16 characters", "token"]),
        (&["STATUS_TOKEN_FILE=utf-16"], &["STATUS_TOKEN_FILE is \"utf-16\"", "is UTF-16", "token"]),
        (&["API_KEY=", "API_KEY_FILE='quoted'"], &["API_KEY_FILE has quotes around its value"]),
    ];
    for (words, said) in rows {
        let errors = refused(&cloud, words);
        assert_eq!(errors.len(), 1, "{words:?} {errors:#?}");
        assert!(said.iter().all(|said| errors[0].contains(said)), "{said:?} is not in {errors:#?}");
        for part in [&KEY[..20], &KEY[20..], "of-mine", "second-line", "two words"] {
            assert!(!errors[0].contains(part), "{errors:#?}");
        }
    }
    let errors = refused_with(&cloud, &[], |command| {
        command.env_remove("API_KEY");
    });
    assert!(errors.len() == 1 && errors[0].starts_with("API_KEY is not set"), "{errors:#?}");
}

/// systemd does not start it again after exit code 2.
#[test]
fn what_may_come_by_itself_is_no_mistake() {
    let cloud = cloud();
    let sidecar = sidecar(&cloud);
    let missing = run(&sidecar, &["API_KEY=", "API_KEY_FILE=run/missing"]);
    assert_eq!(missing.code, Some(1), "{}", missing.err);
    assert!(
        missing.err.contains("API_KEY_FILE is \"run/missing\": the file cannot be read: No such file"),
        "{}",
        missing.err
    );
    // In some containers, systemd makes no credential.
    let credential = run(&sidecar, &["API_KEY=", "API_KEY_FILE=run/missing", "CREDENTIALS_DIRECTORY=run"]);
    assert!(credential.code == Some(1) && credential.err.contains("LXC, LXD and Incus"), "{}", credential.err);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    for words in [&[][..], &["tunnel"]] {
        let listen = [format!("LISTEN_ADDRESS={address}"), format!("TUNNEL_LISTEN_ADDRESS={address}")];
        let run = run(&sidecar, &[&[&*listen[0], &listen[1]], words].concat());
        assert!(run.code == Some(1) && run.err.contains("cannot listen on"), "{words:?} {}", run.err);
    }
}

#[test]
fn what_is_not_even_text_is_one_mistake() {
    let cloud = cloud();
    let mut wrong = Vec::new();
    for name in TABLE.iter().flat_map(|row| row.1) {
        let errors = refused_with(&cloud, command_of(name), |command| {
            if *name == "API_KEY_FILE" {
                command.env_remove("API_KEY");
            }
            command.env(name, OsStr::from_bytes(b"caf\xe9"));
        });
        if errors.len() != 1 || !errors[0].starts_with(&format!("{name} is not UTF-8")) {
            wrong.push(format!("{name}: {errors:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn all_mistakes_are_told_at_once() {
    let words = [
        "API_KEY=",
        "BALENA_API_URL=balena-cloud.com",
        "--ca-file=missing.pem",
        "API_TIMEOUT=2h",
        "--fleet=a/b/c",
        "DEVICE_TAG=two words",
        "--online-only=maybe",
        "TARGET_ADDRESS=wan",
        "USE_PUBLIC_URLS=si",
        "--exporter=node",
        "PUBLIC_URL_DOMAIN=a..b",
        "--labels=hostname",
        "SD_FILE_PATH=folder",
        "--sd-file-mode=rw",
        "WRITE_EMPTY=2",
        "--refresh=500",
        "ONESHOT=once",
        "--dry-run=y",
        "LOG_LEVEL=loud",
        "RUST_LOG=a=b=c",
        "--log-format=xml",
    ];
    let errors = refused(&cloud(), &words);
    assert_eq!(errors.len(), words.len(), "{errors:#?}");
    for word in words {
        let (name, value) = word.split_once('=').unwrap();
        let told = if value.is_empty() { format!("{name} is not set") } else { format!("{name} is {value:?}") };
        let named: Vec<_> = errors.iter().filter(|error| error.starts_with(&told)).collect();
        assert_eq!(named.len(), 1, "{told} in {errors:#?}");
        assert!(value.is_empty() || named[0].contains("it takes"), "{named:?}");
    }
    // Of tags, each is for itself, and so is each of their mistakes.
    let errors = refused(&cloud(), &["--tag=a b", "--tag=fine", "--tag==c"]);
    assert!(errors.len() == 2 && errors[0].contains("\"a b\"") && errors[1].contains("\"=c\""), "{errors:#?}");
}

#[test]
fn a_command_line_that_makes_no_sense_ends_with_2() {
    let cloud = cloud();
    let sidecar = sidecar(&cloud);
    for (words, said) in [
        (&["--flet=acme/gateways"][..], &["--flet", "--fleet"][..]), // a near miss is guessed
        (&["acme/gateways"], &["acme/gateways"]),
        (&["--fleet"], &["--fleet", "value"]),
        (&["--refresh=1s", "--refresh=2s"], &["--refresh", "multiple times"]),
    ] {
        let run = run(&sidecar, words);
        assert_eq!((run.code, &*run.out), (Some(2), ""), "{words:?}");
        assert!(said.iter().all(|said| run.err.contains(said)), "{said:?} is not in {}", run.err);
        assert!(run.err.contains("--help"), "{}", run.err);
    }
    assert_eq!(cloud.requests().len(), 0);
}

/// A switch needs no value, and a word behind it is none of its own; a key is never a flag. The library would name something else.
#[test]
fn what_looks_right_and_is_not_is_explained() {
    let cloud = cloud();
    let sidecar = sidecar(&cloud);
    for (words, said) in [
        (&["--online-only", "true"][..], "--online-only is a switch: write --online-only=true, or leave \"true\" out"),
        (&["--service-labels", "false"], "--service-labels is a switch: write --service-labels=false"),
        (&["check", "--dry-run", "0"], "--dry-run is a switch: write --dry-run=0"),
        (&["--api-key", KEY], "there is no --api-key, since the process list shows flags: set API_KEY"),
        (&["check", &format!("--token={KEY}")], "there is no --token,"),
    ] {
        let run = run(&sidecar, words);
        assert_eq!((run.code, &*run.out), (Some(2), ""), "{words:?}");
        assert!(run.err.contains(said) && run.err.contains("--help"), "{said:?} is not in {}", run.err);
    }
    for (word, said) in [
        ("9100:node", "write node:9100"),
        ("http://fridge:9100/metrics", "is a URL: write [NAME:]PORT[/PATH]"),
        ("9100;8080", "separate exporters with commas"),
        ("9100 8080", "separate exporters with commas"),
    ] {
        let errors = refused(&cloud, &["--exporter", word]);
        assert!(errors.len() == 1 && errors[0].contains(said), "{said:?} is not in {errors:#?}");
    }
    assert_eq!(cloud.requests().len(), 0);
}

#[test]
fn the_nearest_name_of_a_misspelt_variable_is_given() {
    let cloud = cloud();
    for (given, meant) in [
        ("EXPORTER", "EXPORTERS"),
        ("DRYRUN", "DRY_RUN"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("REFERSH_RATE", "REFRESH_RATE"),
        ("FLEETS", "FLEET"),
        ("SDFILE_PATH", "SD_FILE_PATH"),
        ("LISTEN_ADDR", "LISTEN_ADDRESS"),
    ] {
        let run = dry(&cloud, &[&format!("{given}=x")]);
        let said = format!("the variable {given} is none of baletheus: is {meant} meant?");
        assert!(run.warnings().len() == 1 && run.err.contains(&said), "{said}: {}", run.err);
    }
    assert_eq!(
        dry(&cloud, &["APP_URL=x", "BALENA_API_KEY=x", "DEVICE_TYPE=x", "PORT=80", "_=/bin/x", "SD_=x"]).warnings(),
        [""; 0]
    );
    // It explains why an option counts as not set.
    let errors = refused(&self::cloud(), &["API_KEY=", "APIKEY=of-mine"]);
    assert!(
        errors.len() == 2 && errors[1].contains("is API_KEY meant?") && !errors[1].contains("of-mine"),
        "{errors:?}"
    );
}

/// Files of package managers and users' own folders have them.
#[test]
fn completions_have_flags_and_values() {
    for shell in ["bash", "zsh", "fish"] {
        let run = run(&Sidecar::new(binary::path()), &["completions", shell]);
        assert_eq!((run.code, &*run.err), (Some(0), ""), "{shell}");
        for word in ["lan-network", "narrow", "public", "completions"] {
            assert!(run.out.contains(word), "{word} is not in the completions of {shell}");
        }
    }
    assert_eq!(run(&Sidecar::new(binary::path()), &["completions", "cmd"]).code, Some(2));
}

#[test]
fn what_is_allowed_but_looks_wrong_is_warned_of() {
    let cloud = cloud();
    let through = format!("HTTP_PROXY={}", cloud.url()); // so that nothing leaves this machine
    let localhost = format!("http://localhost:{}", cloud.addr().port());
    #[rustfmt::skip] // a table
    let rows: &[(&[&str], &[&[&str]])] = &[
        (&[], &[]),
        (&["FLEET=acme/gateways,12"], &[]),
        (&["FLEET=gateways"], &[&["gateways", "several fleets", "acme/gateways, other/gateways"]]),
        (&["FLEET=acme/presses,nobody/here"], &[&["nobody/here", "was it renamed (an id survives that)"]]),
        (&["FLEET=77"], &[&["the API lists no device", "acme/gateways (id 11, 2 devices)"]]),
        (&["--address=public", "EXPORTERS=80"], &[]),
        (&["--address=public", "EXPORTERS=node:9100,app:80"], &[&["node:9100", "port 80", "9100 is not used"]]),
        (&["EXPORTERS=node:9100"], &[]),
        (&["--sd-file=list.json"], &[]),
        (&["--api-url", &localhost], &[]),
        // that API does not exist, hence the second one
        (&["--api-url=http://api.example.test", &through], &[&["key", "unencrypted", "http://api.example.test", "https"], &["refresh failed"]]),
        (&["--api-url=http://127.0.0.1.example.test", &through], &[&["key", "unencrypted", "https"], &["refresh failed"]]),
        (&["--api-url=https://127.0.0.1:1"], &[&["refresh failed"]]),
    ];
    for (words, expected) in rows {
        let run = run(&sidecar(&cloud), &[*words, &["--oneshot"]].concat());
        let warnings = run.warnings();
        assert_eq!(warnings.len(), expected.len(), "{words:?}\n{}", run.err);
        for (warning, said) in warnings.iter().zip(*expected) {
            assert!(said.iter().all(|said| warning.contains(said)), "{said:?} is not in {warning}");
        }
    }
    // Told once, not at each refresh.
    let (_dir, running) = start(&cloud, &["FLEET=gateways,nobody/here", "LOG_LEVEL=debug"]);
    running.wait_for_lines("is unchanged", 2);
    assert_eq!(stop(running, "TERM").warnings().len(), 2);
}

#[test]
fn help_is_whole_and_grouped_and_shows_no_values() {
    let listed: BTreeSet<_> = OPTIONS.iter().map(|opt| (opt.flag, opt.vars, opt.default)).collect();
    assert_eq!(listed, TABLE.iter().copied().collect());

    const MARK: &str = "marked-value";
    for (verb, args) in [
        (Verb::Discover, &["--help"][..]),
        (Verb::Discover, &["-h"]),
        (Verb::Check, &["check", "--help"]),
        (Verb::Tunnel, &["tunnel", "--help"]),
    ] {
        let mut command = Sidecar::new(binary::path()).args(args.iter().copied()).command();
        // Whatever they are set to: it is not shown, and not judged either.
        command.envs(OPTIONS.iter().flat_map(|opt| opt.vars).map(|var| (var, MARK))).current_dir("/");
        let help = finish(command);
        assert_eq!((help.code, &*help.err), (Some(0), ""));
        assert!(!help.out.contains(MARK), "{}", help.out);
        let mut wrong = Vec::new();
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let too_wide: Vec<_> = help.out.lines().filter(|line| line.chars().count() > 80).collect();
        assert_eq!(too_wide, [""; 0], "{args:?}");
        let is_short = args == ["-h"];
        for opt in OPTIONS.iter().filter(|opt| opt.verbs.contains(&verb)) {
            let start = if opt.flag.is_empty() { opt.vars[0].to_owned() } else { format!("--{}", opt.flag) };
            let is_its = |line: &str| {
                let rest = line.trim_start().strip_prefix(&start);
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '[']))
            };
            let before: Vec<_> = help.out.lines().take_while(|line| !is_its(line)).collect();
            let heading = before.iter().rev().find(|line| !line.is_empty() && !line.starts_with(' ')).unwrap_or(&"");
            let group = if opt.flag.is_empty() { "Variables without a flag" } else { opt.group };
            let indent = |line: &str| line.len() - line.trim_start().len();
            let own: Vec<_> = help.out.lines().skip(before.len()).collect();
            if own.is_empty() && is_short {
                continue; // it is in the long help
            }
            // its line, and those below that are further in
            let first = own.first().map_or(0, |line| indent(line));
            let deeper = own.iter().skip(1).take_while(|line| indent(line) > first).count();
            let line = words(&own.get(..=deeper).unwrap_or_default().join(" "));
            let in_long_help = || {
                opt.vars.iter().all(|var| line.contains(var))
                    && line.contains(opt.more.trim_end_matches('.'))
                    && (opt.is_boolean() || line.contains(&format!("[takes: {}]", opt.takes)))
            };
            let whole = heading.strip_suffix(':') == Some(group)
                && (opt.default.is_empty()
                    || opt.is_boolean()
                    || line.contains(&format!("[default: {}]", opt.default.replace(',', ", "))))
                && line.contains(opt.short)
                && (is_short || opt.flag.is_empty() || in_long_help());
            if !whole {
                wrong.push(format!("{start} in {heading:?}: {line:?}"));
            }
        }
        assert!(wrong.is_empty(), "{}\n{}", wrong.join("\n"), help.out);
        assert_eq!(help.out.contains("Example"), !is_short && args != ["help"], "{}", help.out);
    }
    assert!(OPTIONS.iter().map(|opt| opt.group).collect::<BTreeSet<_>>().len() > 3);
    for flag in ["--version", "-V"] {
        let version = run(&Sidecar::new(binary::path()), &[flag]);
        assert_eq!(version.code, Some(0));
        assert_eq!(version.out, format!("baletheus {}\n", env!("CARGO_PKG_VERSION")));
    }
}

#[test]
fn a_single_refresh_that_fails_ends_with_1() {
    let cloud = broken(503);
    let sidecar = sidecar(&cloud);
    for words in [&["--oneshot"][..], &["--dry-run"]] {
        let run = run(&sidecar, words);
        assert_eq!((run.code, &*run.out), (Some(1), ""), "{}", run.err);
        assert!(run.err.contains("503") && run.err.contains(&cloud.url()), "{}", run.err);
        assert!(!sidecar.path("balena.json").exists());
    }
    // The loop goes on, and a signal is no failure.
    let (_dir, running) = start(&cloud, &[]);
    running.wait_for_lines("next try in", 2);
    assert_eq!(stop(running, "TERM").code, Some(0));
}

#[test]
fn a_signal_ends_a_wait_with_0() {
    let cloud = cloud();
    for signal in ["TERM", "INT"] {
        let (dir, running) = start(&cloud, &["REFRESH_RATE=1h"]);
        running.wait_for("added drill");
        let run = stop(running, signal);
        assert_eq!(run.code, Some(0), "{}", run.err);
        assert!(run.err.contains(&format!("SIG{signal}")), "{}", run.err);
        assert!(dir.list().contains("drill"));
    }
}

#[test]
fn a_signal_ends_a_request_with_0_and_a_single_refresh_with_1() {
    // The first request asks whose key it is, the second for the devices.
    for (words, signal, hangs, expected) in [
        (&[][..], "TERM", 2, 0),
        (&[], "INT", 2, 0),
        (&[], "TERM", 1, 0),
        (&["--oneshot"], "TERM", 2, 1),
        (&["--oneshot"], "INT", 1, 1),
        (&["--dry-run"], "INT", 2, 1),
    ] {
        let cloud = cloud();
        let mut came = 0;
        cloud.intercept(move |_, _| {
            came += 1;
            (came == hangs).then(|| Reply::steps([Step::Hang]))
        });
        let (dir, running) = start(&cloud, words);
        cloud.wait_for_requests(hangs, PATIENCE);
        let run = stop(running, signal);
        assert_eq!(run.code, Some(expected), "{words:?} SIG{signal}\n{}", run.err);
        assert!(!dir.path("balena.json").exists());
    }
}

/// Answers what it is asked for by its whole URL, as a proxy does.
pub fn proxy_to(api: &Arc<Cloud>) -> Cloud {
    let (proxy, api) = (Cloud::start(Vec::new()), api.clone());
    proxy.intercept(move |seen, _| {
        let (_, path) = seen.target.strip_prefix("http://")?.split_once('/')?;
        let seen = Seen { target: format!("/{path}"), ..seen.clone() };
        Some(Reply::steps([Step::Send(api.answer(&seen))]))
    });
    proxy
}

#[test]
fn proxies_are_honoured_and_so_is_no_proxy() {
    let api = Arc::new(cloud());
    let proxy = proxy_to(&api);
    let through = format!("HTTP_PROXY={}", proxy.url());
    // Plain http: the proxy is asked with the whole URL.
    for (words, url) in [
        (&[&*through][..], api.url()),
        (&[&through, "NO_PROXY=example.org"], api.url()),
        (&[&through, "--api-url=http://api.example.test"], "http://api.example.test".into()),
    ] {
        proxy.clear_requests();
        assert_eq!(dry(&api, words).names(), "gate lab press drill", "{words:?}");
        assert_eq!(api.requests().len(), 0, "{words:?}");
        assert!(proxy.requests().iter().all(|seen| seen.target.starts_with(&format!("{url}/"))));
        // Releases, devices, and what asks for more.
        assert_eq!(proxy.requests().len(), 3);
    }
    let localhost = format!("http://localhost:{}", api.addr().port());
    proxy.clear_requests();
    for words in [
        &[&*through, "NO_PROXY=127.0.0.1"][..],
        &["HTTPS_PROXY=http://127.0.0.1:1"],
        &[&through, "NO_PROXY=*", "--api-url", &localhost],
    ] {
        api.clear_requests();
        assert_eq!(dry(&api, words).names(), "gate lab press drill", "{words:?}");
        assert_eq!((proxy.requests().len(), api.requests().len()), (0, 3), "{words:?}");
    }

    // https: the proxy is asked for a tunnel, and refuses here.
    let secure = secure_cloud();
    let url = format!("https://{}", secure.addr());
    let through = format!("HTTPS_PROXY={}", proxy.url());
    let sidecar = sidecar(&secure).env("BALENA_API_URL", &url);
    fs::write(sidecar.path("ca.pem"), CA).unwrap();
    let refused = run(&sidecar, &[&through, "--ca-file=ca.pem", "--dry-run"]);
    assert_eq!(refused.code, Some(1));
    let asked: BTreeSet<_> = proxy.requests().into_iter().map(|seen| (seen.method, seen.target)).collect();
    assert_eq!(asked, [("CONNECT".to_owned(), secure.addr().to_string())].into());
    proxy.clear_requests();
    let direct = run(&sidecar, &[&through, "NO_PROXY=127.0.0.1", "--ca-file=ca.pem", "--dry-run"]);
    assert_eq!(direct.code, Some(0), "{}", direct.err);
    assert_eq!(proxy.requests().len(), 0);
}

#[test]
fn the_api_is_balena_cloud_unless_a_url_says_otherwise() {
    let (cloud, proxy) = (cloud(), cloud());
    let through = format!("HTTPS_PROXY={}", proxy.url()); // so that nothing leaves this machine
    for words in [&[][..], &["BALENA_API_URL="]] {
        let sidecar = sidecar(&cloud).env_remove("BALENA_API_URL");
        let run = run(&sidecar, &[words, &[&through, "--oneshot"]].concat());
        assert_eq!(run.code, Some(1));
        assert!(run.err.contains("devices of https://api.balena-cloud.com to "), "{}", run.err);
        assert!(proxy.requests().iter().all(|seen| seen.target == "api.balena-cloud.com:443"));
        assert_ne!(proxy.requests().len(), 0);
    }
    let (set, given) = (format!("BALENA_API_URL={}", cloud.url()), format!("--api-url={}/", cloud.url()));
    let (nowhere, given_nowhere) = (format!("BALENA_API_URL={NOWHERE}"), format!("--api-url={NOWHERE}"));
    for (words, code) in [
        ([&set, ""], 0),
        ([&nowhere, ""], 1),
        ([&nowhere, &given], 0), // and its slash at the end does no harm
        ([&set, &given_nowhere], 1),
    ] {
        let words: Vec<_> = words.into_iter().filter(|word| !word.is_empty()).chain(["--oneshot"]).collect();
        let run = run(&sidecar(&cloud), &words);
        assert_eq!(run.code, Some(code), "{words:?}\n{}", run.err);
    }
    assert!(cloud.requests().iter().all(|seen| seen.status == 200));
}

/// A cloud behind https, with a certificate that only `CA` vouches for.
fn secure_cloud() -> Cloud {
    let chain = vec![CertificateDer::from_pem_slice(SERVER.as_bytes()).expect("PEM")];
    let key = PrivateKeyDer::from_pem_slice(SERVER_KEY.as_bytes()).expect("PEM");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.expect("versions").with_no_client_auth().with_single_cert(chain, key).expect("a pair");
    let config = Arc::new(config);
    Cloud::start_over((Ipv4Addr::LOCALHOST, 0).into(), devices(), move |stream| {
        let connection = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
        Ok(StreamOwned::new(connection, stream))
    })
}

#[test]
fn a_root_certificate_of_ones_own_is_trusted() {
    let cloud = secure_cloud();
    let sidecar = sidecar(&cloud).env("BALENA_API_URL", format!("https://{}", cloud.addr()));
    fs::write(sidecar.path("ca.pem"), CA).unwrap();
    fs::write(sidecar.path("many.pem"), format!("# another one, and ours\n{SERVER}\n{CA}")).unwrap();
    fs::write(sidecar.path("other.pem"), SERVER).unwrap();
    #[rustfmt::skip] // a table
    let rows: &[(&[&str], i32)] = &[
        (&["BALENA_CA_FILE=ca.pem"], 0),
        (&["--ca-file", "many.pem"], 0),
        (&["BALENA_CA_FILE=missing.pem", "--ca-file=ca.pem"], 0),
        (&[], 1),
        (&["BALENA_CA_FILE="], 1),
        (&["BALENA_CA_FILE=ca.pem", "--ca-file=other.pem"], 1),
    ];
    for (words, code) in rows {
        let run = run(&sidecar, &[*words, &["--dry-run"]].concat());
        assert_eq!(run.code, Some(*code), "{words:?}\n{}", run.err);
        if *code == 1 {
            assert!(run.err.contains("cannot trust") && run.err.contains("--ca-file (CA_FILE)"), "{}", run.err);
        } else {
            assert_eq!(run.names(), "gate lab press drill");
        }
    }
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
