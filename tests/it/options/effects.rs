//! What each option does.

use super::*;

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
        running.wait_for("updated balena.json: 4 targets on 4 devices");
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
