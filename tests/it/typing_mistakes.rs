//! What people type that is not quite what the program takes: it is understood, or the message says what to type.

use std::collections::BTreeSet;
use std::fs;

use crate::support::binary::{self, sidecar};
use crate::support::cloud::{Cloud, KEY, Reply};
use crate::support::fleet::{gateway, gateways};
use crate::support::prometheus::Prometheus;
use crate::support::sidecar::{PATIENCE, Sidecar, finish};
use crate::support::tls::Authority;
use crate::support::vpn::Vpn;

/// Exit code and log of a dry run, and its list.
fn dry(sidecar: &Sidecar, args: &[&str]) -> (Option<i32>, String, String) {
    let mut command = sidecar.command();
    command.args(args).arg("--dry-run");
    let output = finish(command);
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    let (log, list) = (text(output.stderr), text(output.stdout));
    assert!(!log.contains(KEY), "the key is shown: {log}");
    (output.status.code(), log, list)
}

#[test]
fn the_url_of_the_api_may_end_in_its_version() {
    let cloud = Cloud::start(gateways(3));
    for path in ["", "/", "/v7", "/v7/", "/v6", "/v6/"] {
        cloud.clear_requests();
        let url = format!("{}{path}", cloud.url());
        let (code, log, list) = dry(&sidecar(&cloud), &["--api-url", &url]);
        assert_eq!((code, list.lines().count()), (Some(0), 5), "{url}: {log}");
        assert!(log.contains(&format!("devices of {} to", cloud.url())), "{log}");
        let page = cloud.requests().pop().expect("a request").target;
        assert!(page.starts_with("/v7/device?"), "{page}");
    }
    for path in ["/v8", "/v7/device", "/balena", "/v7/v7", "//"] {
        let url = format!("{}{path}", cloud.url());
        let (code, log, _) = dry(&sidecar(&cloud), &["--api-url", &url]);
        let is_taken = path == "//";
        assert_eq!(code, Some(if is_taken { 0 } else { 2 }), "{url}: {log}");
        assert!(is_taken || log.contains(&format!("a path does not belong there; write {};", cloud.url())), "{log}");
    }
}

#[test]
fn a_name_that_balena_reserves_yields_to_the_other_one() {
    let cloud = Cloud::start(gateways(3));
    let (url, nowhere) = (cloud.url(), "http://127.0.0.1:1");
    for (ours, reserved, code) in [("", &*url, 0), (&*url, "", 0), (&*url, nowhere, 0), (nowhere, &*url, 1)] {
        // the supervisor sets it beside what the owner sets
        let sidecar = sidecar(&cloud).env("API_URL", ours).env("BALENA_API_URL", reserved);
        let (ended, log, _) = dry(&sidecar, &[]);
        assert_eq!(ended, Some(code), "API_URL={ours} BALENA_API_URL={reserved}: {log}");
    }
    let sidecar = sidecar(&cloud).env("CA_FILE", "missing.pem").env("BALENA_CA_FILE", "other.pem");
    let (code, log, _) = dry(&sidecar, &[]);
    assert!(code == Some(1) && log.contains("CA_FILE is \"missing.pem\"") && !log.contains("other.pem"), "{log}");
}

/// systemd starts the program again after exit code 1, and not after 2.
#[test]
fn what_may_come_by_itself_is_exit_code_1() {
    let cloud = Cloud::start(gateways(1));
    for (args, code) in [
        (&["--ca-file=later/ca.pem"][..], 1),
        (&["--listen=later.invalid:9797"], 1),
        (&["--ca-file=later/ca.pem", "--timeout=no"], 2),
        (&["--listen=later.invalid"], 2),
    ] {
        let (ended, log, _) = dry(&sidecar(&cloud), args);
        assert_eq!(ended, Some(code), "{args:?}: {log}");
    }
    // A warning beside it changes nothing.
    let (ended, log, _) = dry(&sidecar(&cloud).env("TAG", "site=berlin"), &["--ca-file=later/ca.pem"]);
    assert!(ended == Some(1) && log.contains("is DEVICE_TAG meant?"), "{log}");
    let sidecar = sidecar(&cloud).env("TUNNEL_LISTEN_ADDRESS", "later.invalid:9798");
    let mut tunnel = sidecar.command();
    tunnel.arg("tunnel");
    assert_eq!(finish(tunnel).status.code(), Some(1));
}

#[test]
fn a_slug_is_found_in_whatever_case_it_is_typed() {
    let cloud = Cloud::start(gateways(3));
    let slug = gateway(1)["belongs_to__application"][0]["slug"].as_str().expect("a slug").to_uppercase();
    let (code, log, list) = dry(&sidecar(&cloud), &["--fleet", &slug]);
    assert_eq!((code, list.lines().count()), (Some(0), 5), "{slug}: {log}");
    assert!(!log.contains("WARN"), "{log}");
}

#[test]
fn quotes_around_a_value_are_named_for_every_option_that_has_one() {
    let cloud = Cloud::start(gateways(1));
    for name in ["API_KEY", "API_URL", "FLEET", "DEVICE_TAG", "EXPORTERS", "SD_FILE_PATH", "REFRESH_RATE", "ONESHOT"] {
        for value in ["\"acme/x\"", " 'acme/x'", "\"\""] {
            let (code, log, _) = dry(&sidecar(&cloud).env(name, value), &[]);
            let expected = format!("{name} has quotes around its value, and they are part of it: remove them");
            assert!(code == Some(2) && log.contains(&expected), "{name}={value}: {log}");
        }
    }
    let (code, log, _) = dry(&sidecar(&cloud), &["--fleet", "12", "--fleet", "'acme/x'"]);
    assert!(code == Some(2) && log.contains("--fleet has quotes around its value"), "{log}");
    assert_eq!(cloud.requests().len(), 0);
    // Quotes within a value are part of it.
    assert_eq!(dry(&sidecar(&cloud), &["--tag", "note=\"a\""]).0, Some(0));
}

#[test]
fn a_session_token_is_warned_of_by_discovery_check_and_tunnel() {
    const TOKEN: &str = "eyJhbGciOiJIUzI1NiJ9.eyJpZCI6MX0.c2lnbmF0dXJl";
    const WARNING: &str = "WARN  the API key looks like a session token, which expires: create a named API key";
    let cloud = Cloud::start(gateways(1));
    cloud.set_key(TOKEN);
    let with_token = sidecar(&cloud).env("API_KEY", TOKEN);
    let (code, log, _) = dry(&with_token, &[]);
    assert!(code == Some(0) && log.contains(WARNING) && !log.contains(TOKEN), "{log}");
    fs::write(with_token.path("key"), format!("{TOKEN}\n")).unwrap();
    let from_file = sidecar(&cloud).env_remove("API_KEY").env("API_KEY_FILE", with_token.path("key").to_str().unwrap());
    assert!(dry(&from_file, &[]).1.contains(WARNING));
    let mut check = with_token.command();
    check.args(["check", "--tunnel-url", "http://127.0.0.1:1"]);
    let log = String::from_utf8(finish(check).stderr).unwrap();
    assert!(log.contains(WARNING), "{log}");
    let (tunnel, _) = with_token.tunnel("http://127.0.0.1:1");
    assert!(tunnel.log().iter().any(|line| line.contains(WARNING)), "{:#?}", tunnel.log());

    cloud.set_key(KEY);
    assert!(!dry(&sidecar(&cloud), &[]).1.contains("WARN"));
}

/// The way that the refusal of a query names, as docs/prometheus.md has it, in real Prometheus servers.
#[test]
fn an_exporter_that_needs_parameters_gets_them_from_a_job_of_its_own() {
    let (code, log, _) =
        dry(&Sidecar::new(binary::path()).env("API_KEY", KEY), &["--exporter", "probe:9115/probe?module=http_2xx"]);
    assert!(code == Some(2) && log.contains("__meta_balena_exporter (docs/prometheus.md)"), "{log}");

    let recipe =
        include_str!("../../docs/prometheus.md").split_once("## An exporter that needs parameters").expect("it").1;
    let config = recipe.split_once("```yaml\n").expect("a configuration").1.split_once("```").expect("its end").0;
    let exporters = Cloud::start(Vec::new());
    let kind = [("Content-Type", "text/plain; version=0.0.4")];
    exporters.intercept(move |_, _| Some(Reply::status(200, &kind, b"up_since 1\n")));
    let vpn = Vpn::start(KEY, None);
    vpn.device(gateway(1)["uuid"].as_str().expect("a uuid"), |device| {
        device.ports.extend([(9100, exporters.addr()), (9115, exporters.addr())]);
    });
    let cloud = Cloud::start(gateways(1));
    let sidecar = sidecar(&cloud).env("EXPORTERS", "node:9100,probe:9115/probe");
    sidecar.oneshot();
    let (_tunnel, proxy) = sidecar.tunnel(&vpn.url());
    let config = config.replace("http://127.0.0.1:9798", &proxy).replace(
        "[balena.json]",
        &format!("[{}]\n        refresh_interval: 1s", sidecar.path("balena.json").display()),
    );
    fs::write(sidecar.path("prometheus.yml"), format!("global:\n  scrape_interval: 1s\n{config}")).unwrap();
    for major in [2, 3] {
        exporters.clear_requests();
        let prometheus = Prometheus::start(major, &sidecar.path("prometheus.yml"));
        for job in ["node", "probe"] {
            prometheus.wait_until(&format!("{job} is up"), PATIENCE, |prometheus| {
                prometheus.query(&format!("up{{job=\"{job}\"}} == 1")).pop()
            });
        }
        drop(prometheus);
        let asked: BTreeSet<_> = exporters.requests().into_iter().map(|seen| seen.target).collect();
        let expected = ["/metrics", "/probe?module=http_2xx&target=localhost"].map(str::to_owned);
        assert_eq!(asked, expected.into(), "Prometheus {major}");
    }
}

#[test]
fn a_ca_file_that_cannot_be_used_says_why() {
    let cloud = Cloud::start(gateways(1));
    let sidecar = sidecar(&cloud).env("CA_FILE", "ca.pem");
    let good = Authority::generate().pem();
    let utf_16: Vec<u8> = "\u{feff}-----BEGIN".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let bad = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let trusted = good.replace("BEGIN CERTIFICATE", "BEGIN TRUSTED CERTIFICATE");
    for (file, code, says) in [
        (format!("\u{feff}{good}").into_bytes(), 0, ""),
        (utf_16, 2, "the file is UTF-16: save it as UTF-8"),
        (format!("{good}{bad}").into_bytes(), 2, "certificate 2 in the file cannot be used: "),
        (trusted.replace("END C", "END TRUSTED C").into_bytes(), 2, "the file has a BEGIN TRUSTED CERTIFICATE"),
        (vec![0x30, 0x82, 1, 1], 2, "the file holds no certificate in PEM"),
    ] {
        fs::write(sidecar.path("ca.pem"), file).unwrap();
        let (ended, log, _) = dry(&sidecar, &[]);
        assert!(ended == Some(code) && log.contains(says) && !log.contains("ca-certificates"), "{says}: {log}");
    }
}

#[test]
fn more_fleets_than_a_url_holds_are_said_to_be_too_many() {
    let cloud = Cloud::start(gateways(1));
    for number in [500, 3000] {
        let fleets: Vec<_> = (0..number).map(|number| format!("acme/fleet-{number:05}")).collect();
        let (code, log, _) = dry(&sidecar(&cloud).env("FLEET", fleets.join(",")), &[]);
        assert!(code == Some(1) && log.contains("too long for a URL: name fewer, or fleets by id"), "{log}");
    }
}
