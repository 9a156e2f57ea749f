//! What a device's own tags may change. Whoever holds a device can write them.

use crate::support::binary::sidecar;
use crate::support::cloud::Cloud;
use crate::support::fleet::{gateway, set_tag};
use crate::support::sidecar::{Sidecar, finish};
use serde_json::{Value, json};

const SCRAPE: &str = "prometheus.io/scrape";
const EXPORTERS: &str = "prometheus.io/exporters";
const PORT: &str = "prometheus.io/port";
const PATH: &str = "prometheus.io/path";
const SCHEME: &str = "prometheus.io/scheme";
const INTERVAL: &str = "prometheus.io/interval";
const TIMEOUT: &str = "prometheus.io/timeout";

type Tags<'a> = &'a [(&'a str, &'a str)];

/// A device with tags of its own and of its fleet.
fn device(own: Tags, fleet: Tags) -> Value {
    let mut device = gateway(1);
    own.iter().for_each(|(key, value)| set_tag(&mut device, key, value));
    let fleet = fleet.iter().map(|(key, value)| json!({ "tag_key": key, "value": value }));
    device["belongs_to__application"][0]["application_tag"] = fleet.collect();
    device
}

/// `job port path scheme interval timeout` of each target, with `-` for what is absent, and the warnings.
fn run(mode: &str, own: Tags, fleet: Tags, labels: Tags) -> (Vec<String>, Vec<String>) {
    let cloud = Cloud::start(vec![device(own, fleet)]);
    if !labels.is_empty() {
        cloud.set_services(1, &[("app", labels, &[])]);
    }
    let sidecar = sidecar(&cloud).env("SERVICE_LABELS", "true").env("EXPORTERS", "node:9100,app:8080/m");
    let sidecar = if mode.is_empty() { sidecar } else { sidecar.env("OWN_TAGS", mode) };
    let mut command = sidecar.command();
    command.arg("--dry-run");
    let output = finish(command);
    let groups: Vec<Value> = serde_json::from_slice(&output.stdout).expect("a list");
    let target = |group: &Value| {
        let label = |name: &str| group["labels"][name].as_str().unwrap_or("-").to_owned();
        let port =
            group["targets"][0].as_str().and_then(|target| target.rsplit_once(':')).expect("a port").1.to_owned();
        let labels = ["__metrics_path__", "__scheme__", "__scrape_interval__", "__scrape_timeout__"].map(label);
        [&[label("job"), port][..], &labels].concat().join(" ")
    };
    let log = String::from_utf8(output.stderr).expect("UTF-8");
    let warnings = log.lines().filter(|line| line.contains("WARN")).map(str::to_owned);
    (groups.iter().map(target).collect(), warnings.collect())
}

const BOTH: [&str; 2] = ["node 9100 - - - -", "app 8080 /m - - -"];

/// Own tags, tags of the fleet, the targets, and words of the one warning, if there is one.
type Row<'a> = (Tags<'a>, Tags<'a>, &'a [&'a str], &'a [&'a str]);

#[track_caller]
fn expect(mode: &str, rows: &[Row]) {
    for (own, fleet, targets, words) in rows {
        let (found, warnings) = run(mode, own, fleet, &[]);
        assert_eq!(found, *targets, "{own:?} {fleet:?}: {warnings:#?}");
        assert_eq!(warnings.len(), usize::from(!words.is_empty()), "{own:?} {fleet:?}: {warnings:#?}");
        assert!(warnings.iter().all(|line| line.len() < 1000), "{warnings:?}");
        for word in *words {
            assert!(warnings[0].contains(word), "{own:?} {fleet:?}: {word:?} is not in {}", warnings[0]);
        }
    }
}

const IGNORED: &str = "it is ignored, since a device's own tags are not trusted (--own-tags narrow): tag its fleet, use a service \
    label, or set --own-tags all (OWN_TAGS=all)";

#[test]
fn by_default_a_device_chooses_among_the_exporters_of_its_fleet() {
    let many: Vec<_> = (1..=16).map(|port| format!("{port}/{}", "x".repeat(1000))).collect();
    let many = many.join(",");
    expect(
        "",
        &[
            (&[], &[], &BOTH, &[]),
            (&[(EXPORTERS, "node:9100")], &[], &BOTH[..1], &[]),
            (&[(EXPORTERS, "9100")], &[], &BOTH[..1], &[]),
            (&[(EXPORTERS, "8080,node:9100/metrics")], &[], &BOTH, &[]),
            (&[(PORT, "8080"), (PATH, "/m")], &[], &BOTH[1..], &[]),
            // another port, path or name
            (&[(EXPORTERS, "node:22")], &[], &BOTH, &["gw-1 (0000000)", EXPORTERS, "no exporter node:22", IGNORED]),
            (&[(EXPORTERS, "node:9100/x")], &[], &BOTH, &["no exporter node:9100/x"]),
            (&[(EXPORTERS, "up:9100")], &[], &BOTH, &["no exporter up:9100"]),
            (&[(PORT, "8080"), (PATH, "/x")], &[], &BOTH, &[PORT, "no exporter 8080/x"]),
            // what it may is taken, and the rest is named
            (&[(EXPORTERS, "1,node:9100,2")], &[], &BOTH[..1], &["no exporter 1, 2; only this part is ignored, since"]),
            // and shortened
            (&[(EXPORTERS, &many)], &[], &BOTH, &["no exporter 1/xxx", "xxx; it is ignored"]),
            // of its fleet's tag
            (&[(EXPORTERS, "7")], &[(EXPORTERS, "x:7,y:8")], &["x 7 - - - -"], &[]),
            (&[(EXPORTERS, "9100")], &[(EXPORTERS, "x:7")], &["x 7 - - - -"], &["no exporter 9100"]),
        ],
    );
}

#[test]
fn by_default_a_device_is_scraped_less_often_at_most() {
    let with = |rest: &str| [format!("node 9100 - {rest}"), format!("app 8080 /m {rest}")];
    let (longer, minute, fleets) = (with("- 2m 10s"), with("- 1m 10s"), with("- 30s 10s"));
    let [longer, minute, fleets] = [&longer, &minute, &fleets].map(|both| [&*both[0], &*both[1]]);
    let cut = with("- 30s 30s");
    let cut = [&*cut[0], &*cut[1]];
    let (short, shorter) = (with("- 2m 5s"), with("- 30s 3s"));
    let [short, shorter] = [&short, &shorter].map(|both| [&*both[0], &*both[1]]);
    expect(
        "narrow",
        &[
            (&[(INTERVAL, "2m")], &[], &longer, &[]),
            (&[(INTERVAL, "1m")], &[], &minute, &[]),
            (&[(INTERVAL, "59s")], &[], &BOTH, &[INTERVAL, "shorter than its fleet's interval, or than 1m", IGNORED]),
            (&[(INTERVAL, "5s")], &[], &BOTH, &["is \"5s\"", IGNORED]),
            (&[(INTERVAL, "2m")], &[(INTERVAL, "30s")], &longer, &[]),
            (&[(INTERVAL, "30s")], &[(INTERVAL, "30s")], &fleets, &[]),
            (&[(INTERVAL, "29s")], &[(INTERVAL, "30s")], &fleets, &["\"29s\""]),
            (&[(INTERVAL, "2m"), (TIMEOUT, "5s")], &[], &short, &[]),
            (&[(TIMEOUT, "3s")], &[(INTERVAL, "30s")], &shorter, &[]),
            (&[], &[(INTERVAL, "30s"), (TIMEOUT, "50s")], &cut, &[TIMEOUT, "longer than the interval, which counts"]),
            (
                &[],
                &[(TIMEOUT, "3s")],
                &BOTH,
                &[TIMEOUT, "needs an interval (prometheus.io/interval); it counts as absent"],
            ),
            (
                &[(TIMEOUT, "11s"), (INTERVAL, "2m")],
                &[],
                &longer,
                &[TIMEOUT, "longer than its fleet's time-out, or than 10s"],
            ),
            (&[(TIMEOUT, "4s")], &[(INTERVAL, "30s"), (TIMEOUT, "3s")], &shorter, &["\"4s\""]),
            (&[(SCHEME, "http")], &[], &["node 9100 - http - -", "app 8080 /m http - -"], &[]),
            (&[(SCHEME, "https")], &[], &BOTH, &[SCHEME, "the other scheme", IGNORED]),
            (&[(SCRAPE, "false")], &[(SCRAPE, "true")], &[], &[]),
            (&[(SCRAPE, "true")], &[(SCRAPE, "false")], &[], &[SCRAPE, "its fleet is switched off", IGNORED]),
            (&[(SCRAPE, "true")], &[], &BOTH, &[]),
        ],
    );
}

/// The properties of a service are those of its labels.
#[test]
fn service_labels_are_the_fleets() {
    let labels = [("prometheus.io.port", "5"), ("prometheus.io.interval", "30s"), ("prometheus.io.scheme", "https")];
    let (targets, warnings) = run("", &[(INTERVAL, "20s"), (EXPORTERS, "5"), (SCHEME, "https")], &[], &labels);
    assert_eq!(targets, ["app 5 - https 30s 10s"]);
    assert!(warnings.len() == 1 && warnings[0].contains("\"20s\""), "{warnings:#?}");
}

#[test]
fn all_lets_a_device_name_its_exporters_and_off_lets_it_say_nothing() {
    let own: Tags = &[(EXPORTERS, "x:1"), (SCHEME, "https"), (INTERVAL, "10s")];
    assert_eq!(run("all", own, &[(EXPORTERS, "y:2")], &[]), (vec!["x 1 - https 10s 10s".to_owned()], Vec::new()));
    assert_eq!(run("all", &[(SCRAPE, "true")], &[(SCRAPE, "false")], &[]).0, BOTH);

    let (targets, warnings) = run("off", &[(EXPORTERS, "9100"), (INTERVAL, "2m"), (SCRAPE, "false")], &[], &[]);
    assert_eq!(targets, BOTH);
    assert_eq!(warnings.len(), 3, "{warnings:#?}");
    for key in [EXPORTERS, INTERVAL, SCRAPE] {
        let named = warnings.iter().filter(|line| line.contains(key) && line.contains("(--own-tags off)")).count();
        assert_eq!(named, 1, "{key}: {warnings:#?}");
    }
}

/// The report tells of the fleet's source, and why a device with a tag has no exporter.
#[test]
fn check_tells_where_the_exporters_come_from() {
    let cloud = Cloud::start(vec![device(&[(EXPORTERS, "9100")], &[])]);
    let table = |sidecar: &Sidecar| {
        let mut command = sidecar.command();
        command.args(["check", "--own-tags", "narrow"]);
        String::from_utf8(finish(command).stdout).expect("UTF-8")
    };
    let sidecar = sidecar(&cloud).env("TUNNEL_URL", "http://127.0.0.1:9").env("EXPORTERS", "node:9100,app:1");
    let found = table(&sidecar);
    assert!(found.contains(" node      option  ") && !found.contains(" app "), "{found}");
    let found = table(&sidecar.env("EXPORTERS", "none"));
    assert!(
        found.contains("left out: only its own tag names an exporter, and that is ignored (--own-tags)"),
        "{found}"
    );
}
