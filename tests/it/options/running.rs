//! How it ends, and how it reaches the API.

use super::*;

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
