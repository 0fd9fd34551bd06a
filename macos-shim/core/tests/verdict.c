/* What a C caller sees of the verdict. Prints each check that fails; exits with their number. */
#include <stdio.h>
#include <string.h>

#include "omerta_verdict.h"

#define ETHERNET 14
#define UDP_FRAME (ETHERNET + 20 + 8 + 4)

static const uint8_t GUEST_MAC[6] = {0x52, 0x54, 0, 0, 0, 2};
static const uint8_t GATEWAY_MAC[6] = {0x52, 0x54, 0, 0, 0, 1};
static int failures = 0;

static void expect(const char *what, int outcome, const char *word) {
    const char *got = omerta_outcome_word(outcome);
    if (got == NULL || strcmp(got, word) != 0) {
        printf("%s: expected %s, got %s (%d)\n", what, word, got ? got : "nothing", outcome);
        failures++;
    }
}

static void expect_true(const char *what, int holds) {
    if (!holds) {
        printf("%s: does not hold\n", what);
        failures++;
    }
}

/* UDP from 10.77.0.2:4000 to 192.0.2.10:port, with no UDP checksum. */
static void udp(uint8_t *frame, uint8_t port_high, uint8_t port_low) {
    static const uint8_t packet[UDP_FRAME - ETHERNET] = {
        0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, 10, 77, 0, 2, 192, 0, 2, 10, 0x0f, 0xa0, 0, 0, 0, 12, 0, 0, 'o', 'm', 'e', 'r',
    };
    memcpy(frame, GATEWAY_MAC, 6);
    memcpy(frame + 6, GUEST_MAC, 6);
    frame[12] = 8;
    frame[13] = 0;
    memcpy(frame + ETHERNET, packet, sizeof packet);
    frame[ETHERNET + 22] = port_high;
    frame[ETHERNET + 23] = port_low;
}

int main(void) {
    struct omerta_address guest = {4, {10, 77, 0, 2}};
    struct omerta_address gateway = {4, {10, 77, 0, 1}};
    struct omerta_endpoint consumer = {{4, {192, 0, 2, 10}}, OMERTA_UDP, 51820};
    struct omerta_policy policy = {
        .addresses = &guest, .address_count = 1, .gateways = &gateway, .gateway_count = 1, .allow = &consumer, .allow_count = 1,
    };
    memcpy(policy.mac, GUEST_MAC, 6);
    memcpy(policy.gateway_mac, GATEWAY_MAC, 6);
    struct omerta_guard *guard = omerta_guard_new(&policy);
    if (guard == NULL) {
        printf("a valid policy was refused\n");
        return 1;
    }
    uint8_t frame[UDP_FRAME], answer[OMERTA_ANSWER_CAPACITY];
    size_t length = 99;

    udp(frame, 0xca, 0x6c); /* 51820 */
    expect("to the consumer", omerta_decide(guard, OMERTA_EGRESS, frame, sizeof frame, answer, &length), "allowed");
    expect_true("no answer with an allowed frame", length == 0);
    expect("cut short", omerta_decide(guard, OMERTA_EGRESS, frame, 20, answer, &length), "runt");
    udp(frame, 0, 53);
    expect("another port", omerta_decide(guard, OMERTA_EGRESS, frame, sizeof frame, answer, &length), "endpoint");
    frame[ETHERNET + 15] = 3;
    expect("forged address", omerta_decide(guard, OMERTA_EGRESS, frame, sizeof frame, answer, &length), "source_address");
    frame[11] = 9;
    expect("forged MAC", omerta_decide(guard, OMERTA_EGRESS, frame, sizeof frame, answer, &length), "source_mac");

    /* Who has 10.77.0.1? tell 10.77.0.2 */
    uint8_t request[42] = {
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0, 0, 2, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1,
        0x52, 0x54, 0, 0, 0, 2, 10, 77, 0, 2, 0, 0, 0, 0, 0, 0, 10, 77, 0, 1,
    };
    expect("ARP for the gateway", omerta_decide(guard, OMERTA_EGRESS, request, sizeof request, answer, &length), "answered");
    expect_true("the answer is an ARP frame from the gateway to the guest",
                length == 42 && memcmp(answer, GUEST_MAC, 6) == 0 && memcmp(answer + 22, GATEWAY_MAC, 6) == 0 && answer[21] == 2);
    request[41] = 7;
    expect("ARP for a stranger", omerta_decide(guard, OMERTA_EGRESS, request, sizeof request, answer, &length), "arp_target");

    expect_true("no such direction", omerta_decide(guard, 2, frame, sizeof frame, answer, &length) == OMERTA_INVALID);
    expect_true("no guard", omerta_decide(NULL, OMERTA_EGRESS, frame, sizeof frame, answer, &length) == OMERTA_INVALID);
    expect_true("no frame", omerta_decide(guard, OMERTA_EGRESS, NULL, 0, answer, &length) == OMERTA_INVALID);
    expect_true("no such outcome", omerta_outcome_word(-1) == NULL && omerta_outcome_word(1000) == NULL);
    omerta_guard_free(guard);
    omerta_guard_free(NULL);

    policy.address_count = 0;
    expect_true("a guest without address is refused", omerta_guard_new(&policy) == NULL);
    policy.address_count = 1;
    consumer.port = 0;
    expect_true("UDP without a port is refused", omerta_guard_new(&policy) == NULL);
    consumer.port = 51820;
    guest = (struct omerta_address){6, {[10] = 0xff, [11] = 0xff, [12] = 10, [13] = 77, [15] = 2}};
    expect_true("an IPv4 address dressed as IPv6 is refused", omerta_guard_new(&policy) == NULL);
    expect_true("no policy", omerta_guard_new(NULL) == NULL);
    return failures;
}
