use std::str::FromStr as _;

use hickory_proto::rr::Name;
use proptest::prelude::*;

use super::*;

fn question(name: &str, kind: RecordType) -> Question {
    let labels = name.trim_end_matches('.').split('.').map(str::as_bytes);
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(Name::from_labels(labels).unwrap(), kind));
    parse(&message.to_vec().unwrap()).unwrap()
}

fn record(name: &str, ttl: u32, data: &str) -> Record {
    let data = match data.parse::<IpAddr>() {
        Ok(IpAddr::V4(v4)) => RData::A(rdata::A(v4)),
        Ok(IpAddr::V6(v6)) => RData::AAAA(rdata::AAAA(v6)),
        Err(_) => RData::CNAME(rdata::CNAME(Name::from_str(data).unwrap())),
    };
    Record::from_rdata(Name::from_str(name).unwrap(), ttl, data)
}

fn said(records: &[(&str, u32, &str)]) -> Message {
    let mut message = Message::response(7, OpCode::Query);
    message.insert_answers(records.iter().map(|(n, t, d)| record(n, *t, d)).collect());
    message
}

fn is_never(address: IpAddr) -> bool {
    aegis_wire::egress::never(address, &[]).is_some()
}

fn shown(outcome: &Outcome) -> Vec<String> {
    outcome.answer.records.iter().map(|r| format!("{} {} {}", r.name, r.ttl, r.data)).collect()
}

#[test]
fn questions_are_parsed_or_answered_with_an_error() {
    let good = question("WWW.Example.com.", RecordType::A);
    assert_eq!(good.host.as_ref().unwrap().as_str(), "www.example.com");
    assert!(question("a b.example.", RecordType::A).host.is_none());
    assert!(question("127.0.0.1.", RecordType::A).host.is_none());

    let code = |bytes: &[u8]| {
        let answer = parse(bytes).unwrap_err().unwrap();
        let message = Message::from_vec(&answer).unwrap();
        assert_eq!(message.metadata.id, 7);
        message.metadata.response_code
    };
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    assert_eq!(code(&message.to_vec().unwrap()), ResponseCode::FormErr, "no question");
    message.add_query(Query::query(Name::from_str("a.example.").unwrap(), RecordType::A));
    let one = message.to_vec().unwrap();
    message.add_query(Query::query(Name::from_str("b.example.").unwrap(), RecordType::A));
    assert_eq!(code(&message.to_vec().unwrap()), ResponseCode::FormErr, "two questions");
    assert_eq!(code(&one[..one.len() - 1]), ResponseCode::FormErr, "cut");
    let mut update = one.clone();
    update[2] |= 5 << 3;
    assert_eq!(code(&update), ResponseCode::NotImp);
    let mut chaos = one.clone();
    let last = chaos.len() - 1;
    chaos[last] = 3;
    assert_eq!(code(&chaos), ResponseCode::Refused);
    // An answer is never answered, nor is what is no message at all.
    let mut answer = one;
    answer[2] |= 0x80;
    assert!(matches!(parse(&answer), Err(None)));
    assert!(matches!(parse(&[7]), Err(None)));
    assert!(matches!(parse(&[]), Err(None)));
}

#[test]
fn only_what_answers_the_question_is_passed_on() {
    let asked = question("a.example.", RecordType::A);
    let outcome = asked.clean(
        said(&[
            ("evil.example.", 60, "203.0.113.9"),
            ("b.example.", 99_999, "203.0.113.5"),
            ("A.example.", 60, "b.example."),
            ("a.example.", 60, "2001:db8::1"),
        ]),
        is_never,
    );
    assert_eq!(shown(&outcome), ["a.example. 60 b.example.", "b.example. 3600 203.0.113.5"]);
    assert_eq!(outcome.addresses, [("203.0.113.5".parse().unwrap(), 3600)]);
    assert!(!outcome.nothing && !outcome.rebinding);
}

#[test]
fn addresses_that_are_never_reachable_are_dropped() {
    let asked = question("a.example.", RecordType::A);
    let some = asked.clean(
        said(&[("a.example.", 60, "10.0.0.1"), ("a.example.", 60, "203.0.113.5")]),
        is_never,
    );
    assert_eq!(shown(&some), ["a.example. 60 203.0.113.5"]);
    let none = asked.clean(
        said(&[("a.example.", 60, "x.example."), ("x.example.", 60, "127.0.0.1")]),
        is_never,
    );
    assert!(none.rebinding && none.answer.records.is_empty());
    assert_eq!(none.answer.code, ResponseCode::NXDomain);
    // Nothing of that kind is another thing.
    let nothing = asked.clean(said(&[("a.example.", 60, "::1")]), is_never);
    assert!(nothing.nothing && !nothing.rebinding);
    assert_eq!(nothing.answer.code, ResponseCode::NoError);
}

#[test]
fn aliases_that_go_round_end() {
    let asked = question("a.example.", RecordType::A);
    let round = said(&[("a.example.", 60, "b.example."), ("b.example.", 60, "a.example.")]);
    let outcome = asked.clean(round, is_never);
    assert!(outcome.nothing && outcome.answer.records.len() <= CHAIN_MAX);
}

#[test]
fn a_resolvers_failure_is_not_passed_on_as_records() {
    let asked = question("a.example.", RecordType::A);
    let mut message = said(&[("a.example.", 60, "203.0.113.5")]);
    message.metadata.response_code = ResponseCode::NXDomain;
    let outcome = asked.clean(message.clone(), is_never);
    assert_eq!(outcome.answer.code, ResponseCode::NXDomain);
    assert!(outcome.answer.records.is_empty() && outcome.addresses.is_empty());
    message.metadata.response_code = ResponseCode::NotAuth;
    assert_eq!(asked.clean(message, is_never).answer.code, ResponseCode::ServFail);
}

#[test]
fn answers_to_other_questions_are_not_heard() {
    let asked = question("a.example.", RecordType::A);
    let forwarded = asked.forward(99).unwrap();
    let answer = |change: &dyn Fn(&mut Message)| {
        let mut message = Message::from_vec(&forwarded).unwrap();
        message.metadata.message_type = MessageType::Response;
        change(&mut message);
        asked.hear(99, &message.to_vec().unwrap())
    };
    assert!(matches!(answer(&|_| ()), Some(Ok(_))));
    assert!(matches!(answer(&|m| m.metadata.truncation = true), Some(Err(Truncated))));
    assert!(answer(&|m| m.metadata.id = 98).is_none());
    assert!(answer(&|m| m.metadata.message_type = MessageType::Query).is_none());
    assert!(answer(&|m| drop(m.queries.pop())).is_none());
    assert!(answer(&|m| m.queries[0].query_type = RecordType::AAAA).is_none(), "another kind");
    let other = Name::from_str("b.example.").unwrap();
    assert!(answer(&|m| m.queries[0].name = other.clone()).is_none());
    assert!(asked.hear(99, b"garbage").is_none());
}

#[test]
fn a_long_answer_is_cut_for_a_datagram() {
    let asked = question("a.example.", RecordType::A);
    let records: Vec<Record> =
        (1..=100).map(|n| record("a.example.", 60, &format!("203.0.113.{n}"))).collect();
    let answer = || Answer { records: records.clone(), ..Answer::default() };
    let cut = Message::from_vec(&asked.answer(answer(), true).unwrap()).unwrap();
    assert!(cut.metadata.truncation && cut.answers.is_empty());
    let whole = Message::from_vec(&asked.answer(answer(), false).unwrap()).unwrap();
    assert!(!whole.metadata.truncation && whole.answers.len() == 100);
    assert_eq!(whole.metadata.id, 7);
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_or_refused(
        mut bytes in prop::collection::vec(any::<u8>(), 0..120), like_one: bool,
    ) {
        if like_one && bytes.len() > 12 {
            bytes[2..12].copy_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        }
        if let Ok(question) = parse(&bytes) {
            let answer = question.answer(Answer::no_name(), true).unwrap();
            prop_assert!(answer.len() <= DATAGRAM_MAX);
        }
        let asked = question("a.example.", RecordType::A);
        let _ = asked.hear(0, &bytes);
    }
}
