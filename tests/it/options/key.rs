//! Where the key comes from, and what cannot be one.

use super::*;

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
    // nor is a session token, with its dots
    let token = "eyJhbGciOiJIUzI1NiJ9.eyJpZCI6MTIzNH0.dBjftJeZ4CVPmB92K27uhbUJU1p1r";
    let errors = refused(&cloud, &["API_KEY=", &format!("API_KEY_FILE={token}")]);
    assert!(errors.len() == 1 && errors[0].contains("API_KEY_FILE is not shown"), "{errors:#?}");
    // nor is a password, also where the scheme is forgotten
    for url in
        ["https://me:pass-word@api.balena-cloud.com", "me:pass-word@api.balena-cloud.com", "me:pass-word@api:443"]
    {
        let errors = refused(&cloud, &[&format!("BALENA_API_URL={url}")]);
        assert!(
            errors.len() == 1 && errors[0].contains("BALENA_API_URL") && !errors[0].contains("pass-word"),
            "{errors:?}"
        );
    }
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
